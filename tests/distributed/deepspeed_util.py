"""What the DeepSpeed cases share: small models, engines, one training run, and comparisons."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any
from unittest import mock

import deepspeed.ops

# Before anything initialises DeepSpeed: building its shared-memory op takes a lock that a killed build leaves behind.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False

import deepspeed  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from deepspeed.accelerator import get_accelerator  # noqa: E402
from deepspeed.moe.layer import MoE  # noqa: E402
from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer  # noqa: E402
from deepspeed.utils import groups  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.utils.checkpoint import checkpoint  # noqa: E402

import deepep_moe.integrations.deepspeed  # noqa: E402, F401  makes the block known
from deepep_moe.overflow import replay_of  # noqa: E402

HIDDEN, INNER, EXPERTS = 16, 24, 4


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(HIDDEN, INNER), nn.GELU(), nn.Linear(INNER, HIDDEN))


def narrow_mlp() -> nn.Module:
    """Narrower inside than outside, as DeepSeek's experts are: routing weights are applied inside."""
    return nn.Sequential(nn.Linear(HIDDEN, 8), nn.GELU(), nn.Linear(8, HIDDEN, bias=False))


class GatedMLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(HIDDEN, INNER, bias=False)
        self.up_proj = nn.Linear(HIDDEN, INNER, bias=False)
        self.down_proj = nn.Linear(INNER, HIDDEN, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(torch.nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))


class WithBiasBeside(nn.Module):
    """Like Megatron's MLP: returns its output and a bias that was not added."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(HIDDEN, HIDDEN)
        self.scale = nn.Parameter(torch.ones(HIDDEN))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        assert x.dim() == 4
        return self.inner(x) * self.scale, self.scale


@dataclass(frozen=True)
class Setup:
    """One training run."""

    k: int = 1
    drop: bool = False
    capacity_factor: float = 0.75
    residual: bool = False
    ep_size: int | tuple[int, int] = 2  # of both layers, or of each
    stage: int = 0
    bf16: bool = False
    reentrant: bool | None = None  # activation checkpointing, of either kind
    expert: Callable[[], nn.Module] = mlp
    layer: Callable[..., MoE] = MoE
    used_token: bool = False
    expert_tp: bool = False
    mpu: Any = None
    clear_routes: bool = False  # as in BF16 always: no token is near the border between two experts
    accumulate: int = 1  # gradient accumulation: micro-batches of a step
    evaluate: bool = False  # between steps
    frozen: bool = False  # the experts of the first layer
    further: Mapping[str, Any] = field(default_factory=dict)  # blocks of ds_config
    settings: Mapping[str, Any] = field(default_factory=dict)  # further keys of the block

    @property
    def clear(self) -> bool:
        """In BF16 a token near a border goes either way with the order of sums, also in stock DeepSpeed, and one token
        is a tenth of an expert's gradient. Away from borders, what is left to compare is continuous."""
        return self.bf16 or self.clear_routes

    @property
    def ep_sizes(self) -> tuple[int, int]:
        return self.ep_size if isinstance(self.ep_size, tuple) else (self.ep_size, self.ep_size)

    @property
    def tolerance(self) -> float:
        return 2e-2 if self.bf16 or "torch_autocast" in self.further else 1e-6


class Model(nn.Module):
    """Two MoE layers between linear ones; returns the loss."""

    def __init__(self, setup: Setup) -> None:
        super().__init__()
        self.setup = setup
        self.first = nn.Linear(HIDDEN, HIDDEN)
        self.layers = nn.ModuleList(
            setup.layer(
                HIDDEN,
                setup.expert(),
                EXPERTS,
                ep_size=ep_size,
                k=setup.k,
                drop_tokens=setup.drop,
                capacity_factor=setup.capacity_factor,
                min_capacity=2,
                use_residual=setup.residual,
                use_rts=False,
                top2_2nd_expert_sampling=False,
                enable_expert_tensor_parallelism=setup.expert_tp,
            )
            for ep_size in setup.ep_sizes
        )
        self.layers[0].deepspeed_moe.experts.requires_grad_(not setup.frozen)
        self.last = nn.Linear(HIDDEN, HIDDEN)

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        x = self.first(x)
        aux = x.new_zeros((), dtype=torch.float32)
        used = (
            (torch.arange(x.shape[0] * x.shape[1], device=x.device) % 3 > 0).long() if self.setup.used_token else None
        )
        for layer in self.layers:
            if self.setup.reentrant is None:
                out, l_aux, counts = layer(x, used)
            else:
                out, l_aux, counts = checkpoint(layer, x, used, use_reentrant=self.setup.reentrant)
            assert counts.shape == (EXPERTS,)
            x, aux = x + out, aux + l_aux
        return (self.last(x) - target).float().square().mean() + 0.01 * aux


def build(setup: Setup) -> Model:
    """The same values wherever they should be: experts differ by their number, all else is equal on all ranks."""
    torch.manual_seed(7)
    model = Model(setup)
    for number, layer in enumerate(model.layers):
        ep_size = setup.ep_sizes[number]
        rank, local = dist.get_rank() % ep_size if not setup.expert_tp else 0, EXPERTS // ep_size
        for index, expert in enumerate(layer.deepspeed_moe.experts.deepspeed_experts):
            generator = torch.Generator().manual_seed(100 * number + rank * local + index)
            for parameter in expert.parameters():
                with torch.no_grad():
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * (0.1 if setup.clear else 0.3))
    if setup.clear:
        _route_by_the_first_channels(model)
    return model


@torch.no_grad()
def _route_by_the_first_channels(model: Model) -> None:
    """Expert e looks at channel e (see :func:`batch`), in both layers; all values are BF16 numbers."""
    generator = torch.Generator().manual_seed(8)
    model.first.weight.copy_(torch.eye(HIDDEN) + 0.02 * torch.randn(HIDDEN, HIDDEN, generator=generator))
    for layer in model.layers:
        weight = layer.deepspeed_moe.gate.wg.weight
        weight.copy_(0.15 * torch.eye(EXPERTS, HIDDEN) + 0.005 * torch.randn(weight.shape, generator=generator))
    for parameter in model.parameters():
        parameter.copy_(parameter.bfloat16())


def ds_config(setup: Setup, ours: bool) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": setup.accumulate,
        "zero_optimization": {"stage": setup.stage, "reduce_bucket_size": 10_000},
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": setup.bf16},
        "steps_per_print": 1_000_000,
        "deepep_moe": {"enabled": ours, **setup.settings},
        **setup.further,
    }


def engine_for(setup: Setup, ours: bool) -> Any:
    deepspeed.utils.logger.setLevel("WARNING")
    model = build(setup)
    parameters = {"params": list(model.parameters()), "name": "all"}
    optimizer = torch.optim.SGD(split_params_into_different_moe_groups_for_optimizer(parameters), lr=0.05)
    return deepspeed.initialize(
        model=model, optimizer=optimizer, config=ds_config(setup, ours), mpu=setup.mpu, dist_init_required=False
    )[0]


def batch(setup: Setup, step: int, same_on_all_ranks: bool = False) -> tuple[Tensor, Tensor]:
    rank = 0 if same_on_all_ranks else dist.get_rank()
    generator = torch.Generator().manual_seed(1000 + 10 * step + rank)
    x, target = torch.randn(2, 2, 12, HIDDEN, generator=generator)
    if setup.clear:
        order = torch.rand(2, 12, EXPERTS, generator=generator).argsort(2)  # a first and a second choice stand out
        x = x.scatter_add(2, order[..., :2], torch.tensor([12.0, 6.0]).expand(2, 12, 2)).bfloat16()
    dtype = torch.bfloat16 if setup.bf16 else torch.float32
    return x.to(device(), dtype), target.to(device(), dtype)


def device() -> torch.device:
    """Where engines put models: a GPU where the ranks were started for GPUs (deepspeed_on_gpus), else the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if "nccl" in dist.get_backend() else torch.device("cpu")


def train(engine: Any, setup: Setup, steps: range = range(2)) -> SimpleNamespace:
    """Losses, this rank's gradients of each step before reduction, and the parameters afterwards."""
    losses, gradients = [], []
    together = setup.mpu is not None
    for step in steps:
        found: dict[str, Tensor] = {}

        def keep(name: str, gradient: Tensor, found: dict[str, Tensor] = found) -> None:
            found[name] = found[name] + gradient if name in found else gradient.clone()

        hooks = [
            p.register_hook(lambda gradient, name=name: keep(name, gradient))
            for name, p in engine.module.named_parameters()
            if p.requires_grad
        ]
        for micro_step in range(setup.accumulate):
            loss = engine(*batch(setup, step + 100 * micro_step, together))
            engine.backward(loss)
            engine.step()
            losses.append(loss.detach().double())
        for hook in hooks:
            hook.remove()
        if setup.evaluate:
            engine.eval()
            with torch.no_grad():
                losses.append(engine(*batch(setup, step + 50, together)).double())
            engine.train()
        gradients.append(found)
    state = {name: p.detach().clone() for name, p in engine.module.named_parameters()}
    return SimpleNamespace(losses=torch.stack(losses), gradients=gradients, state=state)


def supports_fp16() -> bool:
    """Whether DeepSpeed runs fp16 here. Many CPUs cannot, and then DeepSpeed itself refuses before we are asked."""
    return bool(get_accelerator().is_fp16_supported())


def near(got: Tensor, expected: Tensor, tolerance: float, what: str) -> None:
    """Norm-relative comparison: outputs reach sizes at which single elements of small value are noise."""
    difference = (got.double() - expected.double()).norm()
    assert difference <= tolerance * expected.double().norm() + 1e-12, (
        f"{what}: {difference / expected.double().norm():.2e} off, allowed {tolerance:.0e}"
    )


def compare(ours: SimpleNamespace, stock: SimpleNamespace, tolerance: float, reduce: bool = False) -> None:
    near(ours.losses, stock.losses, tolerance, "losses")
    for step, (got, expected) in enumerate(zip(ours.gradients, stock.gradients, strict=True)):
        assert got.keys() == expected.keys()
        assert any("deepspeed_experts" in name for name in got)
        whole_got, whole_expected = [], []
        for name in got:
            pair = [got[name].double(), expected[name].double()]
            if reduce:  # tokens are shared out differently, so only the sum over ranks is the same
                for gradient in pair:
                    dist.all_reduce(gradient)
            whole_got.append(pair[0].flatten())
            whole_expected.append(pair[1].flatten())
            if pair[1].norm() > 1e-4:  # the rest is rounding; it counts in the whole below
                near(*pair, 3 * tolerance, f"gradient of {name} in step {step}")
        near(torch.cat(whole_got), torch.cat(whole_expected), tolerance, f"gradient in step {step}")
    for name, value in ours.state.items():
        near(value, stock.state[name], tolerance, f"{name} after training")


def compare_errors(ours: SimpleNamespace, stock: SimpleNamespace, exact: SimpleNamespace) -> None:
    """In BF16: our gradients are as near to those of fp32 as stock's."""
    for got, expected, truth in zip(ours.gradients, stock.gradients, exact.gradients, strict=True):
        errors = [
            torch.cat([(one[name].double() - truth[name].double()).flatten() for name in truth]).norm()
            for one in (got, expected)
        ]
        assert errors[0] <= 1.5 * errors[1], f"{errors[0]:.2e} from fp32, stock DeepSpeed {errors[1]:.2e}"


def _gather_for_gloo(whole: Tensor, part: Tensor, group: Any = None, **_: Any) -> None:
    """DeepSpeed gathers into a flat tensor whatever the parts' shape is, which NCCL takes and gloo does not."""
    dist.all_gather_into_tensor(whole.view(-1), part.reshape(-1), group=group)


def forget_groups() -> None:
    """DeepSpeed keeps process groups per process; a case with tensor parallelism must leave none behind."""
    groups.mpu = None
    groups.expert_tensor_parallel_world_size = 1
    groups._EXPERT_PARALLEL_GROUP.clear()
    groups._EXPERT_PARALLEL_GROUP_RANKS.clear()
    groups._EXPERT_DATA_PARALLEL_GROUP.clear()
    groups._EXPERT_DATA_PARALLEL_GROUP_RANKS.clear()


def parity(setup: Setup, reduce: bool = False, stock_setup: Setup | None = None) -> None:
    """Stock DeepSpeed (as in ``stock_setup`` if given) and this library train the same model."""
    forget_groups()
    try:
        with mock.patch.object(deepspeed.comm, "all_gather_into_tensor", _gather_for_gloo):
            stock = train(engine_for(stock_setup or setup, ours=False), setup)
        engine = engine_for(setup, ours=True)
        assert {type(layer).__name__ for layer in engine.moe_layers} == {"DispatchedMOELayer"}
        ours = train(engine, setup)
        compare(ours, stock, setup.tolerance, reduce)
        replay = replay_of(engine.module)
        assert (replay is not None) == setup.settings.get("replay_on_overflow", False)
        assert replay is None or replay.replays > 0
        if setup.bf16:
            fp32 = replace(setup, bf16=False, clear_routes=True)
            compare_errors(ours, stock, train(engine_for(fp32, ours=False), fp32))
    finally:
        forget_groups()
