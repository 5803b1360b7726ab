"""Data parallelism of a net with experts that are spread over ranks: DDP, FSDP2, gradient clipping.

The experts of a layer are spread over E ranks, and there are R such groups, each with copies (*replicas*) of the same
experts. All E * R ranks have different tokens. DDP and FSDP2 average the gradients of replicated parameters over them.
The gradient of an expert is already a sum over the E ranks that sent it tokens. To become the gradient of the same mean
loss it is summed over the R replicas and divided by E * R:

* DDP must not touch the parameters of experts: :func:`prepare_ddp`.
* FSDP2 shards them over their replicas only, and divides by E * R: :func:`fully_shard_experts`.
* Anything else: leave them out of it, and use :func:`average_expert_gradients`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from deepep_moe.backends.checks import describe
from deepep_moe.dispatcher import TokenDispatcher
from deepep_moe.errors import InputError, UnsupportedError

_AVERAGED = "_deepep_moe_averaged_over"  # attribute of a parameter: E * R


class ExpertParallel(nn.Module):
    """Base class of layers whose ``experts`` are spread over the ranks of ``dispatcher``.

    The functions of this file find such layers inside a net. Derive from it for a layer with a ``forward`` of your own.

    Args:
        dispatcher: of the expert-parallel group.
        experts: module with the parameters of this rank's experts, and no others.
    """

    def __init__(self, dispatcher: TokenDispatcher, experts: nn.Module) -> None:
        super().__init__()
        self.dispatcher = dispatcher
        self.experts = experts
        self._checked: tuple[int, int] | None = None

    def check_data_parallelism(self) -> None:
        """Raise an error if DDP or FSDP mixes this rank's experts with others; to be called first in ``forward``.

        Raises:
            InputError: DDP or FSDP2 includes the experts, or their gradients are not averaged over the ranks of DDP.
            UnsupportedError: FSDP1 includes the experts.
        """
        if self.dispatcher.world_size == 1:
            return
        inside_ddp = DistributedDataParallel._active_ddp_module is not None
        # A constant while torch.compile traces, which traces again when the argument changes.
        problem = self._find_problem(inside_ddp)
        if problem is not None:
            if torch.compiler.is_compiling():
                torch._dynamo.graph_break(problem)  # with fullgraph=True this is the error
            self._raise_problem(inside_ddp)

    @torch.compiler.assume_constant_result
    def _find_problem(self, inside_ddp: bool) -> str | None:
        try:
            self._check_wrappers(inside_ddp)
        except (InputError, UnsupportedError) as error:
            return str(error)
        return None

    @torch.compiler.disable
    def _raise_problem(self, inside_ddp: bool) -> None:
        """Raise the error outside of what torch.compile traces, which would wrap it in an error of its own."""
        self._check_wrappers(inside_ddp)

    def _check_wrappers(self, inside_ddp: bool) -> None:
        ddp = DistributedDataParallel._active_ddp_module if inside_ddp else None
        parameters = list(self.experts.parameters())
        key = (id(ddp), id(parameters[0]) if parameters else 0)
        if self._checked != key:
            if ddp is not None:
                _check_ddp(ddp, parameters, self.dispatcher)
            _check_fsdp(self.experts, self.dispatcher)
            self._checked = key


def expert_parameters(module: nn.Module) -> list[nn.Parameter]:
    """The parameters of this rank's experts in all :class:`ExpertParallel` layers of ``module``, for example MoELayer.

    Use it where experts and the rest must be treated differently: ``ignored_params`` of ``fully_shard``, groups of an
    optimizer. Other ranks have other experts under the same names, so save one ``state_dict`` per rank.

    Args:
        module: any module.

    Returns:
        Each parameter once, in the order of ``module.parameters()``.
    """
    return list({id(p): p for layer in _layers(module) for p in layer.experts.parameters()}.values())


def prepare_ddp(module: nn.Module, replicas: dist.ProcessGroup | DeviceMesh | None = None) -> nn.Module:
    """Make ``DistributedDataParallel(module)`` correct for layers with experts that are spread over ranks.

    DDP then ignores the parameters and buffers of the experts, and their gradients are averaged as
    :func:`average_expert_gradients` says. Replicas start with the values of their first rank. Call it on the module
    that you pass to DDP: ``net = DDP(prepare_ddp(net))``. Collective.

    Args:
        module: changed in place.
        replicas: the ranks with copies of this rank's experts: a process group, or a one-dimensional ``DeviceMesh``.
            None: there are no copies, because the experts are spread over all ranks.

    Returns:
        ``module``.

    Raises:
        InputError: ``replicas`` does not fit the expert-parallel group.
    """
    average_expert_gradients(module, replicas)
    own: set[int] = set()
    for layer in _layers(module):
        if layer.dispatcher.world_size == 1:
            continue
        tensors = list(chain(layer.experts.parameters(), layer.experts.buffers()))
        own.update(id(tensor) for tensor in tensors)
        group, size = _replica_group(layer, replicas)
        if size > 1:
            for tensor in tensors:
                dist.broadcast(tensor.detach(), group=group, group_src=0)
    # DDP looks parameters up under both kinds of names, which differ where a wrapper hides its own.
    names = {
        name
        for prefix, part in (("", module), *((f"{path}.", part) for path, part in module.named_modules()))
        for name, tensor in _named_tensors(part, prefix, recurse=part is module and not prefix)
        if id(tensor) in own
    }
    names.update(getattr(module, "_ddp_params_and_buffers_to_ignore", ()))
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, sorted(names))
    return module


def average_expert_gradients(module: nn.Module, replicas: dist.ProcessGroup | DeviceMesh | None = None) -> None:
    """Average the gradients of the experts in ``module`` over all ranks, in every backward pass from now on.

    They become gradients of the mean of all ranks' losses, like those that DDP averages. With replicas every backward
    pass does one all-reduce per parameter. :func:`prepare_ddp` calls this function; call it yourself with
    ``fully_shard(..., ignored_params=set(expert_parameters(net)))``.

    Args:
        module: gets hooks on the parameters of its experts. A deep copy of it has none.
        replicas: as for :func:`prepare_ddp`.

    Raises:
        InputError: ``replicas`` does not fit the expert-parallel group, or differs from an earlier call's.
    """
    for layer in _layers(module):
        ranks = layer.dispatcher.world_size
        if ranks == 1:
            continue
        group, copies = _replica_group(layer, replicas)
        for parameter in layer.experts.parameters():
            before = getattr(parameter, _AVERAGED, None)
            if before not in (None, ranks * copies):
                raise InputError("replicas", f"{copies} ranks", f"gradients are averaged over {before} ranks already")
            if before is None and parameter.requires_grad:
                parameter.register_hook(partial(_divide, by=ranks))
                if group is not None:
                    parameter.register_post_accumulate_grad_hook(partial(_average, group=group, size=copies))
                setattr(parameter, _AVERAGED, ranks * copies)


def fully_shard_experts(module: nn.Module, mesh: DeviceMesh, **options: Any) -> nn.Module:
    """Apply FSDP2 to the experts in ``module``, sharded over their replicas. Call it before ``fully_shard(module)``.

    For example, with experts spread over 8 ranks and copies of them in each group of 8::

        mesh = init_device_mesh("cuda", (world // 8, 8), mesh_dim_names=("replicas", "experts"))
        net = build_net(TokenDispatcher(mesh["experts"], num_experts))
        fully_shard_experts(net, mesh["replicas"])
        fully_shard(net)  # the rest, over all ranks

    Args:
        module: changed in place.
        mesh: the ranks with copies of this rank's experts, as ``fully_shard`` takes them. Its size may be 1.
        options: other arguments of ``fully_shard``, such as ``mp_policy``.

    Returns:
        ``module``.

    Raises:
        InputError: ``mesh`` holds other ranks of the expert-parallel group, or is no mesh.
    """
    from torch.distributed.fsdp import fully_shard  # slow to import

    for layer in _layers(module):
        if not isinstance(mesh, DeviceMesh):
            raise InputError("mesh", describe(mesh), "must be a DeviceMesh")
        _check_disjoint("mesh", mesh.mesh.flatten().tolist(), layer.dispatcher)
        policy = options.get("mp_policy")
        reduced = getattr(policy, "reduce_dtype", None) or getattr(policy, "param_dtype", None)
        if mesh.size() == 1 and torch.float16 in (reduced, *(p.dtype for p in layer.experts.parameters())):
            # PyTorch 2.13 would divide such gradients twice.
            raise UnsupportedError(
                "fully_shard of experts without replicas cannot reduce fp16: set reduce_dtype to fp32"
            )
        experts: Any = fully_shard(layer.experts, mesh=mesh, **options)
        experts.set_gradient_divide_factor(float(layer.dispatcher.world_size * mesh.size()))
        if mesh.device_type == "cpu" and mesh.size() > 1:  # gloo's only reduction is the sum
            experts.set_force_sum_reduction_for_comms(True)
    return module


@torch.no_grad()
def clip_grad_norm_(module: nn.Module, max_norm: float) -> Tensor:
    """``torch.nn.utils.clip_grad_norm_`` for a net with experts that are spread over ranks. Collective.

    The norm includes the gradients of the experts of all ranks, so that all ranks scale by the same factor;
    PyTorch's function would scale the replicated parameters of each rank differently.

    Args:
        module: its gradients are scaled in place, plain tensors or those of FSDP2. Call it after the backward pass; the
            gradients of replicated parameters must be equal on all ranks by then.
        max_norm: the largest 2-norm that is left alone.

    Returns:
        The norm before clipping, a scalar, equal on all ranks.
    """
    groups: dict[int, dist.ProcessGroup] = {}
    for layer in _layers(module):
        if layer.dispatcher.world_size > 1:
            groups.update((id(p), layer.dispatcher.backend.group) for p in layer.experts.parameters())
    # DTensors of different meshes cannot be in one call.
    buckets: dict[tuple[Any, ...], list[nn.Parameter]] = {}
    for p in module.parameters():
        if p.grad is not None:
            buckets.setdefault((groups.get(id(p)), getattr(p.grad, "device_mesh", None)), []).append(p)
    # All ranks make the same all-reduces, also where no expert of a rank has gradients.
    device = next((p.device for p in module.parameters()), torch.device("cpu"))
    squares = {group: torch.zeros((), dtype=torch.float32, device=device) for group in (None, *groups.values())}
    for (group, _), parameters in buckets.items():
        norm = get_total_norm([p.grad for p in parameters if p.grad is not None])
        squares[group] += (norm.full_tensor() if hasattr(norm, "full_tensor") else norm).float() ** 2
    for group, square in squares.items():
        if group is not None:
            dist.all_reduce(square, group=group)
    total = torch.stack(list(squares.values())).sum().sqrt()
    for parameters in buckets.values():
        clip_grads_with_norm_(parameters, max_norm, total)
    return total


def _layers(module: nn.Module) -> Iterator[ExpertParallel]:
    if not isinstance(module, nn.Module):
        raise InputError("module", describe(module), "must be a torch.nn.Module")
    return (part for part in module.modules() if isinstance(part, ExpertParallel))


def _named_tensors(part: nn.Module, prefix: str, recurse: bool) -> Iterator[tuple[str, Tensor]]:
    named = chain(
        part.named_parameters(recurse=recurse, remove_duplicate=False),
        part.named_buffers(recurse=recurse, remove_duplicate=False),
    )
    return ((prefix + name, tensor) for name, tensor in named)


def _divide(gradient: Tensor, by: int) -> Tensor:
    return gradient / by


@torch.no_grad()
def _average(parameter: Tensor, group: dist.ProcessGroup, size: int) -> None:
    """Average what has accumulated: equal parts from earlier backward passes stay as they are."""
    assert parameter.grad is not None
    dist.all_reduce(parameter.grad, group=group)
    parameter.grad.div_(size)


def _replica_group(
    layer: ExpertParallel, replicas: dist.ProcessGroup | DeviceMesh | None
) -> tuple[dist.ProcessGroup | None, int]:
    """The group of the layer's replicas and its size."""
    if replicas is None:
        ranks, world = layer.dispatcher.world_size, dist.get_world_size()
        if ranks != world:
            raise InputError(
                "replicas",
                None,
                f"the experts are spread over {ranks} of {world} ranks: pass the ranks with copies of them",
            )
        return None, 1
    if isinstance(replicas, DeviceMesh) and replicas.ndim == 1:
        replicas = replicas.get_group()
    if not isinstance(replicas, dist.ProcessGroup):
        raise InputError("replicas", describe(replicas), "must be a process group or a one-dimensional DeviceMesh")
    _check_disjoint("replicas", dist.get_process_group_ranks(replicas), layer.dispatcher)
    return replicas, replicas.size()


def _check_disjoint(argument: str, ranks: Iterable[int], dispatcher: TokenDispatcher) -> None:
    others = _other_ranks(ranks, dispatcher)
    if others:
        raise InputError(
            argument, f"ranks {list(ranks)}", f"must hold copies of this rank's experts, but ranks {others} have others"
        )


def _other_ranks(ranks: Iterable[int], dispatcher: TokenDispatcher) -> list[int]:
    """Those of ``ranks`` that have other experts than this one."""
    members = dist.get_process_group_ranks(dispatcher.backend.group)
    return sorted(set(ranks).intersection(members) - {dist.get_rank()})


def _check_ddp(ddp: DistributedDataParallel, parameters: list[nn.Parameter], dispatcher: TokenDispatcher) -> None:
    included = {id(p) for p in ddp._module_parameters}
    others = _other_ranks(dist.get_process_group_ranks(ddp.process_group), dispatcher)
    if others and any(id(p) in included for p in parameters):
        raise InputError(
            "module",
            "a DistributedDataParallel that includes parameters of experts",
            f"it averages them with other experts, of ranks {others}: use DDP(prepare_ddp(net)) from deepep_moe.nn",
        )
    size = ddp.process_group.size()
    for p in parameters:
        averaged = getattr(p, _AVERAGED, None)
        if others and p.requires_grad and averaged != size:
            told = "not averaged" if averaged is None else f"averaged over {averaged} ranks"
            raise InputError(
                "module",
                f"a DistributedDataParallel over {size} ranks",
                f"the gradients of its experts are {told}: use DDP(prepare_ddp(net, replicas)) from deepep_moe.nn",
            )


def _check_fsdp(experts: nn.Module, dispatcher: TokenDispatcher) -> None:
    # FSDP1 puts views of its flat parameter in the place of parameters.
    tensors = chain(*(chain(part._parameters.values(), vars(part).values()) for part in experts.modules()))
    if any(getattr(t._base, "_is_flat_param", False) for t in tensors if isinstance(t, Tensor)):
        raise UnsupportedError(
            "FullyShardedDataParallel mixes experts of different ranks: use fully_shard_experts (FSDP2)"
        )
    parts = set(experts.modules())
    for group in _fsdp_groups():
        if not any(parameter._module_info.module in parts for parameter in group.fsdp_params):
            continue
        others = _other_ranks(group.mesh_info.mesh.mesh.flatten().tolist(), dispatcher)
        if others:
            raise InputError(
                "module",
                "a fully_shard that includes parameters of experts",
                f"it mixes them with other experts, of ranks {others}: call fully_shard_experts(net, replicas) of "
                "deepep_moe.nn before fully_shard(net)",
            )
        if group.gradient_divide_factor is None:
            raise InputError(
                "module",
                "experts with fully_shard",
                f"their gradients are not divided by the {dispatcher.world_size} ranks whose tokens they get: use "
                "fully_shard_experts from deepep_moe.nn, or set_gradient_divide_factor",
            )


def _fsdp_groups() -> Iterator[Any]:
    """Every parameter group of FSDP2 in this process. PyTorch has no public way to ask who shards a parameter."""
    from torch.distributed import _composable_state

    for reference in list(_composable_state._module_state_mapping.values()):
        state = reference()
        groups = getattr(state, "_fsdp_param_groups", None)
        single = getattr(state, "_fsdp_param_group", None) if groups is None else None
        yield from groups or ([] if single is None else [single])
