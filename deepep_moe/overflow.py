"""Train with outputs of a fixed size, safely: a forward that overflows is run again with more room.

With ``capacity_factor`` above 0 nothing waits for the host, but a batch may need more rows than its outputs have.
:func:`replay_on_overflow` makes a model find that at the end of each forward, on all ranks, before anything can be
computed from it::

    replay = replay_on_overflow(model)
    for tokens, labels in batches:
        loss = model(tokens, labels)      # run again, at the size needed, where it overflowed
        loss.backward()
        optimizer.step()

What a replay needs is saved before the forward: the states of the random number generators and the model's buffers.
Gradients, optimizer states and loss scales are not touched, because no backward has run yet. So gradient accumulation,
loss scaling and any gradient reduction work as without it, and no token is dropped.

Inside a forward an overflow raises nothing: the calls that follow it move nothing and give NaN on all ranks of the
dispatcher's group (:class:`DeferringBackend`), so that all ranks go through the same communication, also that of other
groups. The ranks compare at the end. That is the only wait for the device, once per forward instead of once per layer.

The size needed becomes the new capacity factor of all dispatchers of the model, with a margin; it never shrinks.
Activation checkpointing that runs parts of a forward again uses the factor of that time, so the backward of a forward
must come before a later forward can raise it. ``torch.compile`` of the replaying module itself turns replays off:
compile its submodules.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from deepep_moe.backends.base import Backend, Layout, Phase, Plan, Rows, Tokens, Wire, new_backend_number
from deepep_moe.backends.exchange import gather
from deepep_moe.backends.tensor_plan import TensorPlan
from deepep_moe.dispatcher import TokenDispatcher
from deepep_moe.errors import CapacityError, DeepEPMoEError, InputError
from deepep_moe.shared import Shared

_log = logging.getLogger(__name__)

_MARGIN = 1.125
_MOST_ATTEMPTS = 16
_NO_PLAN = -1  # number of a plan by which nothing moves

SaveState = Callable[[], Callable[[], None]]


def replay_on_overflow(
    model: nn.Module, *, group: dist.ProcessGroup | None = None, save_state: SaveState | None = None
) -> Replay:
    """Let ``model.forward`` run again, with more room, where a dispatcher in it overflows. In place.

    Call it on all ranks, on the module whose forward is one micro-batch: before or after it is wrapped in
    DistributedDataParallel, ``fully_shard`` or ``deepspeed.initialize``. Every rank of ``group`` runs as many forwards.

    Args:
        model: holds :class:`TokenDispatcher` objects in its modules, with ``capacity_factor`` above 0. They are looked
            for at the first forward.
        group: the ranks that communicate with each other during a forward, in whatever way; default: all. With pipeline
            parallelism those of one stage.
        save_state: saves what else a forward changes, and returns what puts it back.

    Raises:
        InputError: ``model`` is no module, or has it already.
        UnsupportedError: the group's backend cannot run here (at the first forward).
    """
    if not isinstance(model, nn.Module):
        raise InputError("model", type(model).__name__, "must be a torch.nn.Module")
    if isinstance(model, _Replaying):
        raise InputError("model", type(model).__name__, "replays already; call replay_on_overflow once")
    replay = Replay(group, save_state)
    vars(model)["_deepep_moe_replay"] = replay
    kind = type(model)
    # A subclass, as fully_shard does it: copies of the model have it too, and their own modules.
    model.__class__ = type(kind.__name__, (_Replaying, kind), {"__module__": kind.__module__})
    return replay


def replay_of(model: nn.Module) -> Replay | None:
    """What :func:`replay_on_overflow` returned for ``model``; None where it was not called."""
    return vars(model).get("_deepep_moe_replay")


def dispatchers_in(model: nn.Module) -> list[TokenDispatcher]:
    """Those that modules have as attributes, or their attributes as ``dispatcher`` (the plugins, and ``Overlap``)."""
    found: dict[int, TokenDispatcher] = {}
    for module in model.modules():
        for value in vars(module).values():
            for one in (value, getattr(value, "dispatcher", None)):
                if isinstance(one, TokenDispatcher):
                    found[id(one)] = one
    return list(found.values())


class Replay(Shared):
    """What :func:`replay_on_overflow` returns.

    Attributes:
        forwards: forwards so far, without the replays.
        replays: how many of them overflowed, each attempt counted.
    """

    def __init__(self, group: dist.ProcessGroup | None, save_state: SaveState | None) -> None:
        self.group = group
        self.save_state = save_state
        self.forwards = self.replays = 0
        self._dispatchers: list[TokenDispatcher] = []
        self._backends: list[DeferringBackend] = []
        self._connected = False

    def __str__(self) -> str:
        return f"replays {self.replays}, capacity factor {self.capacity_factor:.3g}"

    @property
    def capacity_factor(self) -> float:
        """The factor in use, the largest of the dispatchers; 0 before the first forward."""
        return max((dispatcher.capacity_factor for dispatcher in self._dispatchers), default=0.0)

    def run(self, model: nn.Module, forward: Callable[[], Any]) -> Any:
        """``forward()``, as often as it takes. Collective over the group.

        Args:
            model: as for :func:`replay_on_overflow`, which calls this in ``model.forward``.
            forward: whatever runs the layers of ``model``: also the replay of a CUDA graph that captured them, if it
                waits for the device before it returns and captures again after :attr:`replays` has changed.

        Returns:
            What the last call of ``forward`` returned.

        Raises:
            CapacityError: 16 calls in a row have overflowed.
        """
        if not self._connected:
            self._connect(model)
        if not self._dispatchers or torch.compiler.is_compiling() or _is_capturing():
            return forward()
        restore = self._save(model)
        self.forwards += 1
        for attempt in range(_MOST_ATTEMPTS):
            if attempt:
                restore()
            result, failure = None, None
            with self._deferring():
                try:
                    result = forward()
                except DeepEPMoEError:
                    raise
                except Exception as error:  # perhaps only because the model met the NaN of an overflow
                    failure = error
                found = [overrun for backend in self._backends if (overrun := backend.take()) is not None]
            if failure is not None and not (found and self._in_one_group):
                raise failure from (found[0] if found else failure.__cause__)
            failure = None  # its traceback keeps the graph
            overflow = self._agree(found)
            if overflow is None:
                return result
            del result  # and with it the graph, before memory for the next one is needed
            self.replays += 1
            self._grow(*overflow)
        raise found[0] if found else CapacityError(f"other ranks overflowed {_MOST_ATTEMPTS} times in one forward")

    def _connect(self, model: nn.Module) -> None:
        found = dispatchers_in(model)
        if not found:
            raise InputError("model", type(model).__name__, "has no TokenDispatcher in its modules: nothing to replay")
        self._dispatchers = [dispatcher for dispatcher in found if dispatcher.capacity_factor > 0]
        deferring: dict[int, DeferringBackend] = {}
        for dispatcher in self._dispatchers:
            inner = dispatcher.backend
            backend = deferring.setdefault(inner.number, DeferringBackend(inner))
            dispatcher.use_backend(cast(Backend, backend))
            dispatcher.replays = True
        self._backends = list(deferring.values())
        self._connected = True

    @contextmanager
    def _deferring(self) -> Iterator[None]:
        for backend in self._backends:
            backend.begin()
        try:
            yield
        finally:
            for backend in self._backends:
                backend.end()

    def _save(self, model: nn.Module) -> Callable[[], None]:
        """Saves what a forward changes; what is returned puts it back."""
        own = [] if self.save_state is None else [self.save_state()]
        cpu_state = torch.get_rng_state()
        cuda_state = torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None
        buffers = [  # by name, because a forward may assign a new tensor
            (module, name, buffer, None if buffer is None else buffer.detach().clone())
            for module in model.modules()
            for name, buffer in module._buffers.items()
        ]

        def restore() -> None:
            torch.set_rng_state(cpu_state)
            if cuda_state is not None:
                torch.cuda.set_rng_state(cuda_state)
            with torch.no_grad():
                for module, name, buffer, saved in buffers:
                    module._buffers[name] = buffer
                    if buffer is not None and saved is not None:
                        buffer.copy_(saved)
            for put_back in own:
                put_back()

        return restore

    def _agree(self, found: list[CapacityError]) -> tuple[float, int, int] | None:
        """What all dispatchers need from now on, if one of any rank overflowed: factor, tokens, tokens in staging."""
        factor, tokens, staging = self.capacity_factor, 0, 0
        most = max(dispatcher.world_size for dispatcher in self._dispatchers)
        for error in found:
            if error.staging:
                staging = max(staging, math.ceil(_MARGIN * error.needed))
                continue
            wanted = self.capacity_factor * _MARGIN * error.needed / max(error.room, 1)
            factor = max(factor, min(wanted, most))
            if wanted > most or error.room == 0:  # a rank has few tokens of its own: no factor makes these enough
                tokens = max(tokens, math.ceil(_MARGIN * error.needed / factor))
        if not found and self._in_one_group:  # nothing has to be sent where there was no overflow
            return None
        timeout_seconds = max(dispatcher.config.timeout_seconds for dispatcher in self._dispatchers)
        device = self._dispatchers[0].backend.device
        needs = gather("replay", self._all_ranks, device, timeout_seconds, [bool(found), factor, tokens, staging])
        overflowed, factor, tokens, staging = (max(values) for values in zip(*needs))
        return (factor, tokens, staging) if overflowed else None

    @property
    def _all_ranks(self) -> dist.ProcessGroup:
        chosen = self.group if self.group is not None else dist.group.WORLD
        assert chosen is not None
        return chosen

    @property
    def _in_one_group(self) -> bool:
        """Whether all ranks are in the group of each dispatcher: then every rank finds the same overflows."""
        ranks = dist.get_world_size(self._all_ranks)
        return all(dispatcher.world_size == ranks for dispatcher in self._dispatchers)

    def _grow(self, factor: float, tokens: int, staging: int) -> None:
        for dispatcher in self._dispatchers:
            dispatcher.capacity_factor = factor
            dispatcher.least_tokens = max(dispatcher.least_tokens, tokens)
            if staging:
                dispatcher.backend.reserve_tokens(staging)  # type: ignore[attr-defined]
        if dist.get_rank() == 0:
            more = f", and that of at least {tokens} tokens of a rank" if tokens else ""
            more += f"; staging memory holds {staging} tokens of a rank" if staging else ""
            _log.info("deepep_moe: a forward overflowed and runs again; capacity factor %.4g%s", factor, more)


class _Replaying(nn.Module):
    """Mixed into the class of a model that replays."""

    @torch.compiler.disable(recursive=False)
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        replay: Replay = vars(self)["_deepep_moe_replay"]
        return replay.run(self, lambda: super(_Replaying, self).forward(*args, **kwargs))


class DeferringBackend(Shared):
    """A backend whose overflows can be taken at a time of the caller's choice instead of being raised.

    Between :meth:`begin` and :meth:`end` the first overflow makes it go through the motions: plans by which nothing
    moves, outputs of NaN, no communication. All ranks of the group do that from the same plan on: an overflow is found
    while they exchange counts, so each of them knows of it. (The kernels of the nvlink backend do it by themselves, see
    :meth:`Domain.raise_failure`.)
    """

    def __init__(self, inner: Backend) -> None:
        self.inner, self.number = inner, new_backend_number()
        self._defers = False
        self._overflow: CapacityError | None = None
        self._planned: torch.cuda.Event | None = None  # after the last plan

    def __getattr__(self, name: str) -> Any:  # all that is not below
        return getattr(self.inner, name)

    def begin(self) -> None:
        """Defer overflows from now on."""
        self._set(True)

    def end(self) -> None:
        """Raise overflows again; one that was not taken is forgotten."""
        self._set(False)
        self._overflow = None

    def _set(self, defers: bool) -> None:
        self._defers = defers
        domain = getattr(self.inner, "domain", None)
        if domain is not None:
            domain.defers_overflow = defers

    def take(self) -> CapacityError | None:
        """The overflow since :meth:`begin`, if any, once the plans until now are made. Calls work again after it."""
        if self._planned is not None:
            self._planned.synchronize()
            self._planned = None
        self._set(False)
        error, self._overflow = self._overflow, None
        try:
            self.inner.check()
        except CapacityError as noticed:
            error = error or noticed
        return error

    def plan(self, topk_idx: Tensor | None, num_experts: int, **options: Any) -> Plan:
        max_recv, max_rows = options.get("max_recv"), options.get("max_rows")
        if not self._defers or topk_idx is None or max_recv is None or max_rows is None:
            return self.inner.plan(topk_idx, num_experts, **options)
        if self._overflow is None:
            try:
                plan = self.inner.plan(topk_idx, num_experts, **options)
            except CapacityError as error:
                self._overflow = error.with_traceback(None)  # or it would keep the caller's tensors alive
            else:
                if plan.topk_idx.is_cuda and not _is_capturing():
                    self._planned = self._planned or torch.cuda.Event()
                    self._planned.record()
                return plan
        return self._empty_plan(topk_idx, num_experts, options.get("alignment", 1), max_recv, max_rows)

    def _empty_plan(self, topk_idx: Tensor, num_experts: int, alignment: int, max_recv: int, max_rows: int) -> Plan:
        ranks, device = self.inner.world_size, topk_idx.device
        tokens, topk = topk_idx.shape

        def none(*shape: int) -> Tensor:
            return torch.full(shape, -1, dtype=torch.int32, device=device)

        return TensorPlan(
            num_experts=num_experts,
            alignment=alignment,
            identity=(self.inner.number, _NO_PLAN),
            topk_idx=topk_idx.to(torch.int64),
            send_slot=none(tokens, ranks),
            counted=torch.zeros(ranks * ranks + 2 * (num_experts // ranks) + 1, dtype=torch.int64, device=device),
            received=none(max_recv, 1 + 2 * topk),
            row_recv=none(max_rows),
            expert_counts_host=None,
        )

    def dispatch(
        self,
        plan: Plan,
        x: Tensor,
        *,
        layout: Layout,
        wire: Wire = Wire.AS_GIVEN,
        weights: Tensor | None = None,
        **options: Any,
    ) -> Rows:
        if plan.number != _NO_PLAN:
            return self.inner.dispatch(plan, x, layout=layout, wire=wire, weights=weights, **options)
        row_weights = None if weights is None else _nan_like(weights, plan.num_rows)
        return Rows(_nan_like(x, plan.num_rows, x.shape[1]), None, row_weights)

    def combine(
        self, plan: Plan, x: Tensor, *, weights: Tensor | None = None, apply_weights: bool = False, **options: Any
    ) -> Tokens:
        if plan.number != _NO_PLAN:
            return self.inner.combine(plan, x, weights=weights, apply_weights=apply_weights, **options)
        carried = None if weights is None or apply_weights else _nan_like(weights, plan.num_tokens, plan.num_topk)
        return Tokens(_nan_like(x, plan.num_tokens, x.shape[1]), carried)

    def refuse(self, phase: Phase, error: Exception) -> NoReturn:
        if self._overflow is None:
            self.inner.refuse(phase, error)
        raise error  # nobody is on the way into that phase


def _nan_like(x: Tensor, *shape: int) -> Tensor:
    return torch.full(shape, torch.nan, dtype=x.dtype, device=x.device)


def _is_capturing() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
