"""Cases of deepep_moe.nn: layers and their gradients against a dense reference, alone and inside DDP and FSDP2."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.utils.checkpoint import checkpoint

from deepep_moe import DispatcherConfig, TokenDispatcher
from deepep_moe.errors import InputError, PeerError, UnsupportedError
from deepep_moe.nn import (
    GroupedExperts,
    MoELayer,
    TopKRouter,
    average_expert_gradients,
    clip_grad_norm_,
    expert_parameters,
    fully_shard_experts,
    load_balancing_loss,
    prepare_ddp,
)
from deepep_moe.overflow import replay_on_overflow
from tests.distributed.cases_defaults import same_under_other_defaults
from tests.distributed.cases_dispatcher import raises
from tests.launch import case

HIDDEN, FFN, EXPERTS, TOPK, TOKENS = 16, 24, 8, 3, 10
CONFIG = DispatcherConfig(timeout_seconds=30)


class DenseMoE(nn.Module):
    """All experts on one rank, every token through every expert; the weights of experts not chosen are 0."""

    def __init__(self, router: TopKRouter, experts: GroupedExperts, shared: nn.Module | None) -> None:
        super().__init__()
        self.router, self.experts, self.shared_expert = router, experts, shared

    def forward(self, x: Tensor) -> Tensor:
        topk_idx, topk_weights = self.router(x)
        weights = torch.zeros(len(x), EXPERTS).scatter_add(1, topk_idx, topk_weights)
        gate, up = torch.einsum("th,eoh->teo", x, self.experts.weight1).chunk(2, dim=-1)
        y = torch.einsum("tei,ehi->teh", F.silu(gate) * up, self.experts.weight2)
        out = (weights.unsqueeze(-1) * y).sum(1)
        return out if self.shared_expert is None else out + self.shared_expert(x)


class Net(nn.Module):
    """A linear layer, MoE layers, a linear layer."""

    def __init__(
        self,
        dispatcher: TokenDispatcher | None,
        checkpointed: bool = False,
        balance: float = 0.0,
        num_layers: int = 2,
    ) -> None:
        super().__init__()
        torch.manual_seed(11)
        self.checkpointed = checkpointed
        self.first = nn.Linear(HIDDEN, HIDDEN)
        loss = (lambda scores, topk_idx: balance * load_balancing_loss(scores, topk_idx)) if balance else None
        layers = []
        for index in range(num_layers):
            router = TopKRouter(HIDDEN, EXPERTS, TOPK, score=("softmax", "sigmoid")[index], balance_loss=loss)
            experts = GroupedExperts(range(EXPERTS) if dispatcher is None else dispatcher.local_experts, HIDDEN, FFN)
            shared = nn.Linear(HIDDEN, HIDDEN) if index else None
            make = DenseMoE if dispatcher is None else partial(MoELayer, dispatcher)
            layers.append(make(router, experts, shared))
        self.layers = nn.ModuleList(layers)
        self.last = nn.Linear(HIDDEN, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.first(x))
        for layer in self.layers:
            x = x + (checkpoint(layer, x, use_reentrant=False) if self.checkpointed else layer(x))
        return self.last(x)


def batch(rank: int, step: int = 0) -> Tensor:
    return torch.randn(TOKENS, HIDDEN, generator=torch.Generator().manual_seed(100 * step + rank))


def loss_of(net: nn.Module, x: Tensor) -> Tensor:
    return (net(x) ** 2).mean()


def dense_gradients(ranks: int, steps: int = 1, balance: float = 0.0, **options: Any) -> dict[str, Tensor]:
    """Gradients of the mean of all ranks' losses, by parameter name; of several steps: their sum."""
    net = Net(None, balance=balance / ranks, **options)
    for step in range(steps):
        for rank in range(ranks):
            (loss_of(net, batch(rank, step)) / ranks).backward()
    return {name: p.grad for name, p in net.named_parameters()}


def plain(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def check_gradients(net: nn.Module, expected: dict[str, Tensor], first: int = 0, scale: float = 1.0) -> None:
    """``first``: index of this rank's first expert."""
    found = set()
    for name, p in net.named_parameters():
        name = name.removeprefix("module.").replace("_orig_mod.", "")
        wanted = expected[name] * scale
        if ".experts." in name:
            wanted = wanted[first : first + plain(p).shape[0]]
        torch.testing.assert_close(plain(p.grad), wanted, atol=1e-6, rtol=1e-4, msg=lambda told: f"{name}: {told}")  # noqa: B023
        found.add(name)
    assert found == expected.keys()


def meshes(group: dist.ProcessGroup) -> list[DeviceMesh]:
    """Every way to cut the ranks in groups of experts, as (replicas, experts)."""
    world = dist.get_world_size(group)
    return [
        init_device_mesh("cpu", (world // ranks, ranks), mesh_dim_names=("replicas", "experts"))
        for ranks in {1, 2, world}
        if world % ranks == 0
    ]


@case(ranks=(1, 2, 4))
def a_layer_computes_what_a_dense_one_does(group: dist.ProcessGroup) -> None:
    """Without data parallelism: outputs, gradients of own tokens, and of experts summed over ranks."""
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    for settings in ({}, {"expert_alignment": 4}, {"capacity_factor": 2.0 * world, "max_tokens_per_rank": TOKENS}):
        dispatcher = TokenDispatcher(group, EXPERTS, settings)
        net, dense = Net(dispatcher), Net(None)
        first = dispatcher.local_experts.start
        for layer, reference in zip(net.layers, dense.layers, strict=True):
            own = reference.experts.weight1[first : first + len(dispatcher.local_experts)]
            assert torch.equal(layer.experts.weight1, own)  # equal seeds: the same experts, however they are spread
        x, exact = (batch(rank).requires_grad_() for _ in range(2))
        out, expected = net(x), dense(exact)
        torch.testing.assert_close(out, expected)
        out.square().sum().backward()
        expected.square().sum().backward()
        torch.testing.assert_close(x.grad, exact.grad)
        for p in dense.parameters():
            dist.all_reduce(p.grad, group=group)
        for p in net.parameters():
            if not any(p is expert for expert in expert_parameters(net)):
                dist.all_reduce(p.grad, group=group)
        check_gradients(net, {name: p.grad for name, p in dense.named_parameters()}, first)


@case(ranks=(1, 2, 3))
def ranks_may_have_other_numbers_of_tokens_and_shapes(group: dist.ProcessGroup) -> None:
    dispatcher = TokenDispatcher(group, 6, CONFIG)
    rank = dispatcher.rank
    torch.manual_seed(0)
    layer = MoELayer(dispatcher, TopKRouter(HIDDEN, 6, 2), GroupedExperts(dispatcher.local_experts, HIDDEN, FFN))
    for shape in ((2, 3 + rank, HIDDEN), (0, HIDDEN) if rank else (5, HIDDEN), (HIDDEN,), (0, HIDDEN)):
        x = torch.randn(shape, requires_grad=True)
        out = layer(x)
        assert out.shape == shape
        rows = layer(x.reshape(-1, HIDDEN))
        assert torch.equal(rows, out.reshape(-1, HIDDEN))
        out.sum().backward()
        assert x.grad.shape == shape
    assert all(p.grad is not None for p in layer.parameters())


@case(ranks=(1, 2, 4))
def ddp_gives_the_gradients_of_a_dense_net(group: dist.ProcessGroup) -> None:
    """With and without replicas of experts, accumulated over two passes, checkpointed, and with a balance loss."""
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    for mesh in meshes(group):
        for options in ({}, {"checkpointed": True}, {"balance": 0.1}):
            dispatcher = TokenDispatcher(mesh["experts"], EXPERTS, CONFIG)
            net = Net(dispatcher, **options)
            if mesh["replicas"].get_local_rank():
                for p in expert_parameters(net):
                    p.data.zero_()  # replicas start with the values of the first one
            net = DDP(prepare_ddp(net, mesh["replicas"]))
            loss_of(net, batch(rank)).backward()
            expected = dense_gradients(world, **options)
            check_gradients(net, expected, dispatcher.local_experts.start)
            with net.no_sync():
                loss_of(net, batch(rank, 1)).backward()
            loss_of(net, batch(rank, 2)).backward()
            check_gradients(net, dense_gradients(world, steps=3, **options), dispatcher.local_experts.start)


@case(ranks=(2,))
def ddp_sees_through_wrappers(group: dist.ProcessGroup) -> None:
    """Wrappers that hide their own part of parameter names, and a layer that a net has twice."""
    rank = dist.get_rank(group)
    dispatcher = TokenDispatcher(group, EXPERTS, CONFIG)
    net = Net(dispatcher)
    net.layers[1].experts.register_buffer("scale", torch.full((1,), float(rank)))
    for index, layer in enumerate(net.layers):
        net.layers[index] = checkpoint_wrapper(layer)
    net.again = net.layers[0]
    assert len(expert_parameters(net)) == 4
    wrapped = DDP(prepare_ddp(net))
    loss_of(wrapped, batch(rank)).backward()
    expected = dense_gradients(2)
    for name, p in net.named_parameters():
        wanted = expected[name.replace("_checkpoint_wrapped_module.", "")]
        wanted = wanted[dispatcher.local_experts.start :][: len(p)] if ".experts." in name else wanted
        torch.testing.assert_close(p.grad, wanted, atol=1e-6, rtol=1e-4)
    assert net.layers[1].experts.scale == rank  # DDP broadcasts other buffers
    whole = DDP(prepare_ddp(checkpoint_wrapper(Net(dispatcher))))
    loss_of(whole, batch(rank)).backward()
    for name, p in whole.module.named_parameters():
        wanted = expected[name]
        wanted = wanted[dispatcher.local_experts.start :][: len(p)] if ".experts." in name else wanted
        torch.testing.assert_close(p.grad, wanted, atol=1e-6, rtol=1e-4)


@case(ranks=(2,))
def an_overflow_is_replayed(group: dist.ProcessGroup) -> None:
    rank = dist.get_rank(group)
    tight = DispatcherConfig(timeout_seconds=30, capacity_factor=0.25, max_tokens_per_rank=TOKENS)
    dispatcher = TokenDispatcher(group, EXPERTS, tight)
    net = Net(dispatcher)
    replay = replay_on_overflow(net)
    wrapped = DDP(prepare_ddp(net))
    loss_of(wrapped, batch(rank)).backward()
    assert replay.replays > 0
    check_gradients(wrapped, dense_gradients(2), dispatcher.local_experts.start)


@case(ranks=(1, 2, 4))
def fsdp2_gives_the_gradients_of_a_dense_net(group: dist.ProcessGroup) -> None:
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    for mesh in meshes(group):
        for sharded, options in ((True, {}), (True, {"checkpointed": True}), (False, {})):
            dispatcher = TokenDispatcher(mesh["experts"], EXPERTS, CONFIG)
            net = Net(dispatcher, **options)
            if sharded or dispatcher.world_size == 1:
                fully_shard_experts(net, mesh["replicas"])
                fully_shard(net)
            else:
                average_expert_gradients(net, mesh["replicas"])
                fully_shard(net, ignored_params=set(expert_parameters(net)))
            first = dispatcher.local_experts.start
            loss_of(net, batch(rank)).backward()
            check_gradients(net, dense_gradients(world, **options), first)
            loss_of(net, batch(rank, 1)).backward()
            check_gradients(net, dense_gradients(world, steps=2, **options), first)
            del net


@case(ranks=(2,))
def fsdp2_mixed_precision_reaches_the_experts(group: dist.ProcessGroup) -> None:
    mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("replicas", "experts"))
    dispatcher = TokenDispatcher(mesh["experts"], EXPERTS, CONFIG)
    net = Net(dispatcher)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    fully_shard_experts(net, mesh["replicas"], mp_policy=policy)
    fully_shard(net, mp_policy=policy)
    seen = []
    net.layers[0].experts.register_forward_hook(lambda module, args, out: seen.append((args[0].dtype, out.dtype)))
    loss_of(net, batch(dist.get_rank(group))).backward()
    assert seen == [(torch.bfloat16, torch.bfloat16)]
    expected = dense_gradients(2)
    for name, p in net.named_parameters():
        assert p.grad.dtype == torch.float32
        got, wanted = plain(p.grad), expected[name]
        wanted = wanted[dispatcher.local_experts.start :][: len(got)] if ".experts." in name else wanted
        assert (got - wanted).norm() <= 0.1 * wanted.norm() + 1e-3, name


@case(ranks=(2, 4))
def data_parallelism_that_mixes_experts_is_refused(group: dist.ProcessGroup) -> None:
    """By every rank, in the first forward pass, and before anything is sent."""
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    told = "a DistributedDataParallel that includes parameters of experts"
    remedy = "use DDP(prepare_ddp(net)) from deepep_moe.nn"
    dispatcher = TokenDispatcher(group, EXPERTS, CONFIG)
    wrapped = DDP(Net(dispatcher))
    for _ in range(2):
        with raises(InputError, told, remedy, "other experts, of ranks"):
            wrapped(batch(rank))
    prepared_inside = nn.Sequential(prepare_ddp(Net(dispatcher)))  # names are not those that DDP sees
    with raises(InputError, told, remedy):
        DDP(prepared_inside)(batch(rank))
    prepared = prepare_ddp(Net(dispatcher))
    with raises(InputError, "the gradients of its experts are not averaged"):
        DDP(copy.deepcopy(prepared))(batch(rank))  # names are copied, hooks are not
    copied = copy.deepcopy(prepared)
    again = DDP(prepare_ddp(copied))
    loss_of(again, batch(rank)).backward()
    check_gradients(copied, dense_gradients(world), dispatcher.local_experts.start)

    sharded = fully_shard(Net(dispatcher))
    with raises(InputError, "a fully_shard that includes parameters of experts", "call fully_shard_experts"):
        sharded(batch(rank))
    part = Net(dispatcher)
    fully_shard(part.layers[1])
    with raises(InputError, "a fully_shard that includes parameters of experts"):
        part(batch(rank))
    undivided = Net(dispatcher)
    mesh = init_device_mesh("cpu", (1, world), mesh_dim_names=("replicas", "experts"))
    for layer in undivided.layers:
        fully_shard(layer.experts, mesh=mesh["replicas"])
    with raises(InputError, "their gradients are not divided by the", f"{world} ranks"):
        undivided(batch(rank))
    with raises(InputError, f"mesh = ranks {list(range(world))}", "must hold copies of this rank's experts"):
        fully_shard_experts(Net(dispatcher), mesh["experts"])
    for original in (False, True):
        flat = FullyShardedDataParallel(Net(dispatcher), device_id=torch.device("cpu"), use_orig_params=original)
        with raises(UnsupportedError, "use fully_shard_experts (FSDP2)"):
            flat(batch(rank))

    with raises(InputError, "replicas", "must hold copies of this rank's experts"):
        prepare_ddp(Net(dispatcher), group)
    for wrong in (mesh, [0]):
        with raises(InputError, "replicas", "must be a process group or a one-dimensional DeviceMesh"):
            prepare_ddp(Net(dispatcher), wrong)
    Net(dispatcher)(batch(rank))  # the group goes on


@case(ranks=(4,))
def replicas_that_are_forgotten_are_refused(group: dist.ProcessGroup) -> None:
    rank = dist.get_rank(group)
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicas", "experts"))
    net = Net(TokenDispatcher(mesh["experts"], EXPERTS, CONFIG))
    with raises(InputError, "replicas = None", "spread over 2 of 4 ranks"):
        prepare_ddp(net)
    alone = DeviceMesh("cpu", torch.arange(4).view(4, 1), mesh_dim_names=("all", "one"))["one"]
    prepare_ddp(net, alone)
    with raises(InputError, "over 4 ranks", "averaged over 2 ranks"):
        DDP(net)(batch(rank))
    with raises(InputError, "replicas = 2 ranks", "averaged over 2 ranks already"):
        prepare_ddp(net, mesh["replicas"])


@case(ranks=(2,))
def a_compiled_net_trains_the_same(group: dist.ProcessGroup) -> None:
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    dispatcher = TokenDispatcher(group, EXPERTS, CONFIG)
    compiled = partial(torch.compile, fullgraph=True, backend="aot_eager")
    net, x = DDP(prepare_ddp(compiled(Net(dispatcher, num_layers=1)))), batch(rank)
    out = net(x)
    torch.testing.assert_close(out, Net(dispatcher, num_layers=1)(x))
    out.square().mean().backward()
    check_gradients(net, dense_gradients(world, num_layers=1), dispatcher.local_experts.start)
    torch._dynamo.reset()  # the check is made while a graph is traced
    with raises(Exception, "a DistributedDataParallel that includes parameters of experts"):
        DDP(compiled(Net(dispatcher, num_layers=1)))(x)
    with raises(InputError, "a DistributedDataParallel that includes parameters of experts"):
        DDP(torch.compile(Net(dispatcher, num_layers=1), backend="aot_eager"))(x)


@case(ranks=(1, 2))
def gradients_are_clipped_by_one_norm(group: dist.ProcessGroup) -> None:
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    dense = Net(None)
    for r in range(world):
        (loss_of(dense, batch(r)) / world).backward()
    max_norm = 0.01
    norm = torch.nn.utils.clip_grad_norm_(dense.parameters(), max_norm)
    assert norm > 2 * max_norm
    expected = {name: p.grad for name, p in dense.named_parameters()}
    mesh = init_device_mesh("cpu", (1, world), mesh_dim_names=("replicas", "experts"))
    for sharded in (False, True):
        dispatcher = TokenDispatcher(mesh["experts"], EXPERTS, CONFIG)
        net: nn.Module = Net(dispatcher)
        if sharded:
            fully_shard(fully_shard_experts(net, mesh["replicas"]))
        else:
            net = DDP(prepare_ddp(net))
        loss_of(net, batch(rank)).backward()
        torch.testing.assert_close(plain(clip_grad_norm_(net, max_norm)), norm)
        check_gradients(net, expected, dispatcher.local_experts.start)
        torch.testing.assert_close(clip_grad_norm_(net, 1.0), torch.tensor(max_norm))  # and now nothing is scaled
        check_gradients(net, expected, dispatcher.local_experts.start)


@case(ranks=(2,))
def clipping_needs_no_gradients_of_experts(group: dist.ProcessGroup) -> None:
    """A rank without gradients takes part in the sum all the same."""
    net = Net(TokenDispatcher(group, EXPERTS, CONFIG))
    if dist.get_rank(group) == 0:
        for p in expert_parameters(net):
            p.grad = torch.ones_like(p)
    norm = clip_grad_norm_(net, 1e9)
    torch.testing.assert_close(norm, torch.tensor(sum(p.numel() for p in expert_parameters(net)) ** 0.5))


@case(ranks=(1, 2))
def copies_and_saved_states(group: dist.ProcessGroup) -> None:
    rank = dist.get_rank(group)
    dispatcher = TokenDispatcher(group, EXPERTS, CONFIG)
    net = Net(dispatcher)
    average = copy.deepcopy(net)
    assert average.layers[0].dispatcher is dispatcher
    assert not any(a is b for a, b in zip(expert_parameters(net), expert_parameters(average), strict=True))
    assert torch.equal(average(batch(rank)), net(batch(rank)))
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.1)
    changed = net(batch(rank))
    assert not torch.equal(average(batch(rank)), changed)
    average.load_state_dict(net.state_dict())
    assert torch.equal(average(batch(rank)), changed)
    assert f"(experts): GroupedExperts(experts {dispatcher.local_experts[0]} to" in repr(net)


@case(ranks=(1, 2, 3))
def a_mistake_on_one_rank_reaches_all(group: dist.ProcessGroup) -> None:
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    dispatcher = TokenDispatcher(group, 2 * world, CONFIG)
    torch.manual_seed(0)

    def layer(**parts: Any) -> MoELayer:
        default = {
            "router": TopKRouter(HIDDEN, 2 * world, 2),
            "experts": GroupedExperts(dispatcher.local_experts, HIDDEN, FFN),
        }
        return MoELayer(dispatcher, **{**default, **parts})

    class Broken(nn.Module):
        def forward(self, *args: Any) -> Any:
            raise ValueError("out of paper")

    class Nothing(nn.Module):
        def forward(self, *args: Any) -> Any:
            return None

    right, x, own = layer(), torch.randn(5, HIDDEN), dispatcher.local_experts
    wrong: list[tuple[Callable[[], Any], type[Exception], str]] = [
        (lambda: layer(router=Broken())(x), ValueError, "out of paper"),
        (lambda: layer(router=lambda x: (x, x, x))(x), InputError, "router(x) = 3 values: must be two tensors"),
        (lambda: layer(router=lambda x: x)(x), InputError, "router(x) = a Tensor: must be two tensors"),
        (lambda: layer(router=lambda x: (x, x))(x), InputError, "topk_idx = torch.float32: must be int32 or int64"),
        (lambda: layer(experts=Broken())(x), ValueError, "out of paper"),
        (lambda: layer(experts=Nothing())(x), InputError, "rows = None: must be a torch.Tensor"),
        (lambda: layer(shared_expert=Broken())(x), ValueError, "out of paper"),
        (
            lambda: layer(shared_expert=nn.Linear(HIDDEN, 1))(x),
            InputError,
            "shared_expert(x) = shape (5, 1): must be [5, 16]",
        ),
        (lambda: layer(experts=GroupedExperts(own, HIDDEN + 1, FFN))(x), InputError, "must be [M, 17]"),
        (
            lambda: layer(experts=GroupedExperts(own, HIDDEN, FFN, dtype=torch.bfloat16))(x),
            InputError,
            "rows = torch.float32: must be torch.bfloat16, the dtype of the experts' weights",
        ),
        (lambda: right(None), InputError, "x = None: must be a torch.Tensor"),
        (lambda: right(torch.tensor(1.0)), InputError, "x = a tensor without dimensions"),
        (lambda: right(x.double()), InputError, "x = torch.float64: must be one of"),
        (lambda: right(torch.randn(5, HIDDEN + 1)), InputError, "x = hidden size 17: the router has hidden size 16"),
        (lambda: right(torch.randn(5, 0)), InputError, "x = hidden size 0: the router has hidden size 16"),
        (lambda: right(torch.randn(5, HIDDEN, device="meta")), InputError, "x = on device meta: must be on cpu"),
        (lambda: layer(router=lambda x: (torch.full((5, 2), 2 * world), torch.ones(5, 2)))(x), InputError, "topk_idx"),
        (
            lambda: layer(router=TopKRouter(HIDDEN, 2 * world, 2, balance_loss=lambda scores, idx: scores.sum(0)))(x),
            InputError,
            "balance_loss(scores, topk_idx) = shape",
        ),
    ]
    for call, kind, told in wrong:
        if rank == world - 1:
            with raises(kind, told):
                call()
        else:
            with raises(PeerError, f"rank {world - 1}", told):
                right(x)
    right(x)  # the group goes on
    for part, value, told in (
        ("dispatcher", group, "must be a TokenDispatcher"),
        ("experts", len, "must be a torch.nn.Module"),
        ("experts", GroupedExperts(own.stop + 1, HIDDEN, FFN), "must be those of this rank"),
        ("router", 3, "must be callable"),
        ("router", TopKRouter(HIDDEN, 2 * world + 1, 2), f"{2 * world + 1} experts: the dispatcher has {2 * world}"),
        ("shared_expert", 3, "must be a torch.nn.Module"),
    ):
        with raises(InputError, part, told):
            MoELayer(**{"dispatcher": dispatcher, "router": right.router, "experts": right.experts, part: value})


@case(ranks=(1, 2))
def autocast_runs_the_experts_in_its_dtype(group: dist.ProcessGroup) -> None:
    dispatcher = TokenDispatcher(group, EXPERTS, CONFIG)
    net, x = Net(dispatcher).layers[0], batch(dispatcher.rank).requires_grad_()
    exact = net(x.detach())
    with torch.autocast("cpu", torch.bfloat16):
        out = net(x)
    assert out.dtype == torch.bfloat16
    assert (out - exact).norm() < 2e-2 * exact.norm()
    out.float().square().mean().backward()
    assert {p.grad.dtype for p in net.parameters()} == {torch.float32}


@case(ranks=(1, 2))
def defaults_of_the_caller_do_not_matter(group: dist.ProcessGroup) -> None:
    dispatcher = TokenDispatcher(group, EXPERTS, CONFIG)
    net = Net(dispatcher, balance=0.1)
    x = batch(dispatcher.rank)

    def program() -> list[Any]:
        net.zero_grad()
        out = net(x)
        out.backward(out.detach())
        norm = clip_grad_norm_(net, 0.1)
        made = GroupedExperts(2, HIDDEN, FFN, device="cpu", dtype=torch.float32)
        return [out, norm, *(p.grad.clone() for p in net.parameters()), made.weight1.shape, made.weight1.dtype]

    same_under_other_defaults(program)
    with torch.device("meta"):
        assert Net(dispatcher).layers[0].experts.weight1.is_meta
