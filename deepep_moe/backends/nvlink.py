"""The backend for one NVLink domain: CUDA kernels write into the memory of peer GPUs.

The steps of one batch (device code in csrc/throughput):

* :meth:`NVLinkBackend.plan` counts tokens, exchanges the counts through peer memory and computes the place of every
  row. The host waits once, when it allocates outputs, for the two numbers that size them (nvlink_plan.py). With
  ``max_recv`` it does not wait, and the call can be captured in a CUDA graph.
* :meth:`NVLinkBackend.dispatch` and :meth:`NVLinkBackend.combine` are one kernel each. Rows in flight are in staging
  memory, which is double-buffered by epoch, so calls need no barrier between them.

Kernels wait for at most ``timeout_seconds``. Errors found by kernels are written to pinned memory and raised by the
next call; until then the affected outputs are NaN. A rank that refuses a call still enters it, marked as refused, so
that its peers raise instead of waiting.
"""

from __future__ import annotations

import logging
from contextlib import suppress
from typing import NoReturn

import torch
import torch.distributed as dist
from torch import Tensor

from deepep_moe.backends.base import (
    Backward,
    Destinations,
    Layout,
    Phase,
    Plan,
    Rows,
    Tokens,
    Wire,
    new_backend_number,
)
from deepep_moe.backends.checks import (
    check_combine,
    check_dispatch,
    check_plan_inputs,
    check_topk_idx,
)
from deepep_moe.backends.exchange import gather
from deepep_moe.backends.nvlink_operation import describe_format, describe_operation, format_code
from deepep_moe.backends.nvlink_plan import DevicePlan, route_of
from deepep_moe.backends.nvlink_staging import Staging
from deepep_moe.backends.tensor_plan import is_plan
from deepep_moe.config import DispatcherConfig
from deepep_moe.domain import Domain
from deepep_moe.errors import CapacityError, DeepEPMoEError, HandleError, InputError, PeerError, PeerTimeoutError
from deepep_moe.extension import _C, DTYPE_CODES, VECTOR_BYTES, address, aligned, current_stream, vector_padded
from deepep_moe.notices import span
from deepep_moe.peer_memory import PeerMemory
from deepep_moe.shared import Shared

_log = logging.getLogger(__name__)

_CHANNELS_PER_SCALE = 128
_MOST_EARLY_WORDS = 2 << 20  # most int32 words of a plan to allocate before its sizes are known

_FORMATS = (
    {}
    if _C is None
    else {
        Wire.AS_GIVEN: _C.Format.AS_GIVEN,
        Wire.E4M3: _C.Format.TO_FP8,
        Wire.E4M3_TO_BF16: _C.Format.THROUGH_FP8,
    }
)


class NVLinkBackend(Shared):
    """:class:`~deepep_moe.backends.base.Backend` for GPUs that can access each other's memory.

    Args:
        group: the expert-parallel process group, of any backend and with any members; used during set-up only.
        device: this rank's GPU.
        config: ``num_sms``, ``max_tokens_per_rank``, ``timeout_seconds`` and ``debug_waits`` apply.
    """

    name = "nvlink"
    plans_have_extra = False
    ignores: tuple[str, ...] = ("rail_chunk_bytes", "ranks_per_node")

    def __init__(self, group: dist.ProcessGroup, device: torch.device, config: DispatcherConfig) -> None:
        self.group, self.device, self.config = group, device, config
        self.number, self._plans = new_backend_number(), 0
        self.domain = Domain(group, device, config.timeout_seconds, config.debug_waits)
        self.domain.describe = {"OPERATION": describe_operation, "FORMAT": describe_format}
        self.rank, self.world_size = self.domain.rank, self.domain.size
        self.num_sms = torch.cuda.get_device_properties(device).multi_processor_count
        self._engine: _C.ThroughputEngine | None = _C.ThroughputEngine(self.domain.runtime)
        self._control: PeerMemory | None = PeerMemory(group, device, _C.ThroughputEngine.control_bytes())
        self._engine.set_control(self._control.addresses)
        self._staging = Staging(self.domain, self._engine)
        self._unfinished: DevicePlan | None = None  # the plan whose sizes the host has not read yet
        self._broken: DeepEPMoEError | None = None  # a permanent error that the domain does not record
        self.checks_arguments = True
        """Set to False by a caller that has checked the arguments of its calls (each check takes about 10 us)."""

    @staticmethod
    def supports(group: dist.ProcessGroup, device: torch.device, config: DispatcherConfig | None = None) -> str | None:
        if device.type != "cuda":
            return f"nvlink needs CUDA tensors, the device is {device}"
        return Domain.supports(group, device, (config or DispatcherConfig()).timeout_seconds)

    @staticmethod
    def why_not_auto(group: dist.ProcessGroup, device: torch.device, config: DispatcherConfig) -> str | None:
        if 0 < config.ranks_per_node < dist.get_world_size(group):
            return f"ranks_per_node = {config.ranks_per_node} cuts the group into several nodes"
        return None

    @property
    def usable(self) -> bool:
        return self._engine is not None and self._broken is None and self.domain.usable

    # -- planning ------------------------------------------------------------------------------------------------

    def destinations(self, topk_idx: Tensor, num_experts: int) -> Destinations:
        engine = self._open()
        check_topk_idx(topk_idx, num_experts, self.world_size, self.device)
        self._check_limits(num_experts, topk_idx.shape[1])
        topk_idx = topk_idx.to(torch.int64).contiguous()
        tokens, topk = topk_idx.shape
        counts = torch.zeros(self.world_size + num_experts, dtype=torch.int32, device=self.device)
        per_rank, per_expert = counts.split([self.world_size, num_experts])
        in_rank = torch.empty((tokens, self.world_size), dtype=torch.bool, device=self.device)
        engine.destinations(
            topk_idx=topk_idx.data_ptr(),
            num_tokens=tokens,
            num_topk=topk,
            num_experts=num_experts,
            num_tokens_per_rank=per_rank.data_ptr(),
            num_tokens_per_expert=per_expert.data_ptr(),
            is_token_in_rank=in_rank.data_ptr(),
            stream=current_stream(self.device),
        )
        return Destinations(per_rank, None, per_expert, in_rank)

    def plan(
        self,
        topk_idx: Tensor | None,
        num_experts: int,
        *,
        alignment: int = 1,
        is_token_in_rank: Tensor | None = None,
        num_tokens_per_expert: Tensor | None = None,
        max_recv: int | None = None,
        max_rows: int | None = None,
    ) -> Plan:
        engine = self._enter_plan()
        identity = (self.number, self._plans)
        try:
            if self.checks_arguments:
                given = (topk_idx, num_experts, alignment, is_token_in_rank, num_tokens_per_expert)
                check_plan_inputs(*given, self.world_size, self.device)
                self._check_limits(num_experts, 0 if topk_idx is None else topk_idx.shape[1])
            if torch.cuda.is_current_stream_capturing():
                self._check_capture(num_experts, topk_idx, max_recv)
        except Exception as error:
            self._refuse_plan(error)
        if topk_idx is not None:
            tokens, topk = topk_idx.shape
            topk_idx = topk_idx.to(torch.int64).contiguous()
        else:
            assert is_token_in_rank is not None
            tokens, topk = is_token_in_rank.shape[0], 0
            topk_idx = torch.empty((tokens, 0), dtype=torch.int64, device=self.device)
        # Kernels that run later read these, so the plan keeps them alive.
        inputs = [None if t is None else t.contiguous() for t in (is_token_in_rank, num_tokens_per_expert)]
        membership, expert_counts = map(address, inputs)
        stream = self._enter_stream()

        def begin(wait: bool) -> None:
            engine.begin_plan(
                topk_idx=topk_idx.data_ptr(),
                given_membership=membership,
                given_expert_counts=expert_counts,
                num_tokens=tokens,
                num_topk=topk,
                num_experts=num_experts,
                alignment=alignment,
                wait=wait,
                max_recv=max_recv or 0,
                max_rows=_C.NO_EXPERT_ROWS if max_rows is None else max_rows,
                stream=stream,
            )

        if max_recv is not None:
            if not self._staging.serves(1, topk, 0):
                # The staging size is not known before the first exchange of counts, so the host waits this once.
                begin(wait=True)
                _, _, max_tokens = self._wait_plan(0)
                self._reserve(max(self.config.max_tokens_per_rank, max_tokens), topk, 0)
            begin(wait=False)
            sizes = (max_recv, max_rows or 0)
            plan = DevicePlan(num_experts, alignment, identity, topk_idx, self.world_size, inputs=inputs, sizes=sizes)
            self._place(plan, *sizes, stream)
            return plan
        begin(wait=True)
        plan = DevicePlan(
            num_experts, alignment, identity, topk_idx, self.world_size, inputs=inputs, finish=self._finish_plan
        )
        self._unfinished = plan
        # Enqueue the next kernel before the host knows the sizes, with memory for the largest possible ones.
        most_recv = self.world_size * self._staging.tokens
        most_rows = most_recv * topk + num_experts // self.world_size * (alignment - 1) if topk else 0
        if self._staging.serves(1, topk, 0) and most_recv * (1 + 2 * topk) + most_rows <= _MOST_EARLY_WORDS:
            self._place(plan, most_recv, most_rows, stream)
        return plan

    def _place(self, plan: DevicePlan, max_recv: int, max_rows: int, stream: int) -> None:
        """Enqueue the kernel that places rows. The plan stays empty if a rank has more tokens than staging holds."""
        try:
            plan.allocate(max_recv, max_rows, stream)
        except torch.OutOfMemoryError:
            self.domain.give_up()  # the peers are waiting for this rank
            raise
        send_slot, counted, received, row_recv = plan.addresses()
        self._open().place_plan(
            send_slot=send_slot,
            counted=counted,
            received=received,
            row_recv=row_recv,
            max_recv=max_recv,
            max_rows=max_rows,
            num_blocks=self._blocks(),
            stream=stream,
        )

    def _finish_plan(self, plan: DevicePlan) -> tuple[int, int]:
        """Wait for N and M of ``plan``, which must be the plan begun last."""
        self._unfinished = None
        num_recv, num_rows, max_tokens = self._wait_plan(plan.counts_address)
        if max_tokens > self._staging.tokens or not plan.is_placed:
            self._reserve(max(self.config.max_tokens_per_rank, max_tokens), plan.num_topk, 0)
            self._place(plan, num_recv, num_rows, self._enter_stream())
        return num_recv, num_rows

    def _wait_plan(self, counts_address: int) -> tuple[int, int, int]:
        """Wait for the plan begun last: N, M, and the most tokens of any rank. Raises the error of a failed plan."""
        with span("deepep_moe.wait plan"):
            numbers = self._open().wait_plan(counts_address)
        if numbers is None:
            self.domain.give_up()  # takes effect when the GPU reaches it
            self._broken = PeerTimeoutError(
                f"rank {self.rank}: the plan kernel did not run within {self.config.timeout_seconds:g} s; something "
                "before it on this GPU does not end. Destroy this buffer or dispatcher."
            )
            raise self._broken
        num_recv, num_rows, max_tokens, failed = numbers
        if failed:
            self.check()
            self.domain.resume()
            raise PeerError(f"the plan failed on rank {self.rank}, for a reason that another rank knows")
        return num_recv, num_rows, max_tokens

    def _refuse_plan(self, error: Exception) -> NoReturn:
        """Raise ``error`` after telling the peers, which enter the same plan, not to wait for this rank."""
        if not torch.cuda.is_current_stream_capturing():  # during capture no kernel runs, so no peer waits
            engine = self._open()
            engine.refuse_plan(self._enter_stream())
            engine.wait_plan(0)
            if self.domain.usable:
                self.domain.resume()  # clears the report about the peers, which is a consequence of this error
        try:
            raise error
        finally:
            del error  # see _refuse_operation

    # -- moving rows ---------------------------------------------------------------------------------------------

    def dispatch(
        self,
        plan: Plan,
        x: Tensor,
        *,
        layout: Layout,
        wire: Wire = Wire.AS_GIVEN,
        scales: Tensor | None = None,
        weights: Tensor | None = None,
        backward: Backward = Backward.NONE,
        into: Rows | None = None,
    ) -> Rows:
        engine = self._enter()
        quantize = wire is not Wire.AS_GIVEN
        try:
            if self.checks_arguments:
                check_dispatch(self, plan, x, layout=layout, wire=wire, scales=scales, weights=weights)
            sent_dtype = torch.float8_e4m3fn if quantize else x.dtype
            row_bytes = self._row_bytes("x", x, sent_dtype)
            x = _readable(x)
        except Exception as error:
            self._refuse_operation(error, plan)
        hidden = x.shape[1]
        num_scales = hidden // _CHANNELS_PER_SCALE if quantize else 0 if scales is None else scales.shape[1]
        pitch = vector_padded(row_bytes + 4 * num_scales + (4 * plan.num_topk if weights is not None else 0))
        self._reserve(self._staging.tokens, plan.num_topk, pitch)
        stream = self._enter_stream()

        grouped, dequantize = layout is Layout.BY_EXPERT, wire is Wire.E4M3_TO_BF16
        count = plan.num_rows if grouped else plan.num_recv
        out_scales = out_weights = None
        try:
            if into is not None:
                out, out_scales, out_weights = into
            else:
                out = self._empty(x.dtype if dequantize else sent_dtype, count, hidden)
                if num_scales and not dequantize:
                    out_scales = self._empty_scales(count, num_scales, scales)
                if weights is not None:
                    out_weights = self._empty(torch.float32, count, None if grouped else plan.num_topk)
            if weights is not None and weights.stride(1) != 1:
                weights = weights.contiguous()
        except torch.OutOfMemoryError as error:
            self._refuse_operation(error, plan)

        blocks = self._blocks()
        engine.dispatch(
            route_of(plan, layout, stream),
            format=_FORMATS[wire],
            format_code=format_code(x.dtype, wire, scales, num_scales, backward),
            row_bytes=row_bytes,
            pitch=pitch,
            x=x.data_ptr(),
            x_stride=x.stride(0) * x.element_size(),
            scales=address(scales),
            scale_row_stride=0 if scales is None else scales.stride(0),
            scale_channel_stride=0 if scales is None else scales.stride(1),
            num_scales=num_scales,
            with_weights=weights is not None,
            weights=address(weights),
            weights_stride=0 if weights is None else weights.stride(0),
            out=out.data_ptr(),
            out_scales=address(out_scales),
            out_scale_row_stride=0 if out_scales is None else out_scales.stride(0),
            out_scale_channel_stride=0 if out_scales is None else out_scales.stride(1),
            out_weights=address(out_weights),
            num_blocks=blocks,
            num_send_blocks=_dispatch_send_blocks(blocks, self.world_size),
            stream=stream,
        )
        return Rows(out, out_scales, out_weights)

    def combine(
        self,
        plan: Plan,
        x: Tensor,
        *,
        layout: Layout,
        weights: Tensor | None = None,
        apply_weights: bool = False,
        bias: tuple[Tensor, ...] = (),
        backward: Backward = Backward.NONE,
        into: Tokens | None = None,
    ) -> Tokens:
        engine = self._enter()
        if is_plan(plan):
            plan.known_sizes()  # raises on all ranks if the plan failed
        try:
            if self.checks_arguments:
                check_combine(self, plan, x, layout=layout, weights=weights, apply_weights=apply_weights, bias=bias)
            row_bytes = self._row_bytes("x", x, x.dtype)
            x = aligned(x)
        except Exception as error:
            self._refuse_operation(error, plan)
        carry = weights is not None and not apply_weights
        pitch = vector_padded(row_bytes + (4 * plan.num_topk if carry else 0))
        self._reserve(self._staging.tokens, plan.num_topk, pitch)
        stream = self._enter_stream()

        out_weights = None
        try:
            if into is not None:
                out, out_weights = into
            else:
                out = self._empty(x.dtype, plan.num_tokens, x.shape[1])
            if weights is not None:
                weights = weights.contiguous()
            if carry and into is None:
                out_weights = self._empty(torch.float32, plan.num_tokens, plan.num_topk)
            added = [aligned(b) for b in bias]
        except torch.OutOfMemoryError as error:
            self._refuse_operation(error, plan)
        blocks = self._blocks()
        engine.combine(
            route_of(plan, layout, stream),
            dtype=DTYPE_CODES[x.dtype],
            format_code=format_code(x.dtype, Wire.AS_GIVEN, None, 0, backward),
            row_bytes=row_bytes,
            pitch=pitch,
            x=x.data_ptr(),
            weights=address(weights),
            apply_weights=apply_weights,
            carry_weights=carry,
            bias0=added[0].data_ptr() if added else 0,
            bias1=added[1].data_ptr() if len(added) > 1 else 0,
            out=out.data_ptr(),
            out_stride=out.stride(0) * out.element_size(),
            out_weights=address(out_weights),
            out_weights_stride=0 if out_weights is None else out_weights.stride(0),
            num_blocks=blocks,
            num_send_blocks=_combine_send_blocks(blocks, self.world_size, layout is Layout.BY_EXPERT),
            stream=stream,
        )
        return Tokens(out, out_weights)

    def refuse(self, phase: Phase, error: Exception) -> NoReturn:
        if phase != "plan":
            self._enter()
            self._refuse_operation(error, None)
        self._enter_plan()
        self._refuse_plan(error)

    def _refuse_operation(self, error: Exception, plan: Plan | None) -> NoReturn:
        if not torch.cuda.is_current_stream_capturing():  # during capture no kernel runs, so no peer waits
            # A plan that failed moves no rows and enters no operation. Without a valid plan, assume a good one (0).
            counted = plan.counted.data_ptr() if is_plan(plan) and plan.owner == self.number else 0
            self._open().refuse_operation(counted, self._enter_stream())
        try:
            raise error
        finally:
            del error  # its traceback holds this frame: together they would keep the caller's tensors alive

    def reserve_tokens(self, tokens: int) -> None:
        """Let staging hold ``tokens`` of each rank, as an overflow of staging memory asks for. Collective."""
        self._reserve(tokens, 0, 0)

    # -- memory --------------------------------------------------------------------------------------------------

    def reserve(self, tokens: int, topk: int) -> None:
        """Make room for plans of so many tokens of a rank, equal on all ranks. Collective if staging grows."""
        self._open()
        self._reserve(max(tokens, self._staging.tokens), topk, 0)

    def _reserve(self, tokens: int, topk: int, pitch: int) -> None:
        """Make staging hold ``tokens`` per rank, ``topk`` places each and rows of ``pitch`` bytes.

        Collective if staging grows. Ranks decide alike, because the numbers were exchanged by the plan or are compared
        by the growth operation.
        """
        if self._staging.serves(tokens, topk, pitch):
            return
        if self._unfinished is not None:
            self._unfinished.known_sizes()  # its kernels may use the memory that is replaced here
        self._staging.grow(tokens, topk, pitch, self._enter_stream())

    def _check_capture(self, num_experts: int, topk_idx: Tensor | None, max_recv: int | None) -> None:
        """Raise CapacityError unless a plan can be captured in a CUDA graph: no host wait, no memory to allocate."""
        how = "set capacity_factor (num_worst_tokens of Buffer) and max_tokens_per_rank, and run once before capturing"
        if max_recv is None:
            raise CapacityError(f"the host waits for the sizes of this plan, which a CUDA graph cannot capture: {how}")
        tokens, topk = (0, 0) if topk_idx is None else topk_idx.shape
        if not self._staging.serves(1, topk, 0) or not self._open().scratch_serves(tokens, topk, num_experts):
            raise CapacityError(
                f"a plan of {tokens} tokens needs more memory, which a CUDA graph cannot capture: {how}"
            )

    def _blocks(self) -> int:
        """Grid size for kernels with one block per SM."""
        return self.config.num_sms or self.num_sms

    def _empty(self, dtype: torch.dtype, rows: int, columns: int | None = None) -> Tensor:
        """``torch.empty``, with about half its host time."""
        if columns is None:
            return torch.empty_strided((rows,), (1,), dtype=dtype, device=self.device)
        return torch.empty_strided((rows, columns), (columns, 1), dtype=dtype, device=self.device)

    def _empty_scales(self, rows: int, num_scales: int, given: Tensor | None) -> Tensor:
        """Memory for received scales: row-major if the ``given`` ones are, else column-major, which is how
        block-scaled GEMMs load them."""
        dtype = torch.float32 if given is None else given.dtype
        if given is not None and given.stride(1) == 1:
            return self._empty(dtype, rows, num_scales)
        return self._empty(dtype, num_scales, vector_padded(4 * rows) // 4).t()[:rows]

    # -- checks --------------------------------------------------------------------------------------------------

    def check(self) -> None:
        self.domain.raise_failure()

    def close(self) -> None:
        if self._engine is None:
            return
        if self.config.debug_waits:
            self.print_waits()
        torch.cuda.synchronize(self.device)
        self._engine = self._control = self._unfinished = None
        self._staging.free()

    def barrier(self) -> None:
        self._open()
        gather("barrier", self.group, self.device, self.config.timeout_seconds, None)

    def waits(self) -> dict[str, float]:
        """Summed over the warps, by peer; measured with ``config.debug_waits`` only. Waits for the device."""
        if not self.config.debug_waits:
            return {}
        return {f"rank {peer}": seconds for peer, seconds in enumerate(self.domain.runtime.wait_seconds())}

    def print_waits(self) -> None:
        """Print how long the warps of this rank waited for each rank, in milliseconds (``config.debug_waits``)."""
        seconds = self.domain.runtime.wait_seconds()
        waits = ", ".join(f"rank {r}: {s * 1e3:.3f} ms" for r, s in enumerate(seconds))
        print(f"deepep_moe: rank {self.rank} waited (summed over warps) for {waits}", flush=True)

    def _open(self) -> _C.ThroughputEngine:
        if self._engine is None:
            raise HandleError("this backend was closed; make a new dispatcher or Buffer")
        if self._broken is not None:
            raise self._broken
        return self._engine

    def _enter(self) -> _C.ThroughputEngine:
        """The engine, for a dispatch or combine. Raises the error of an earlier call, if there is one.

        This rank then does not enter the new call. That is safe: after a failed call, the kernels of all ranks do
        nothing until the error is raised, whichever call raises it.
        """
        engine = self._open()
        self.domain.raise_failure()
        return engine

    def _enter_plan(self) -> _C.ThroughputEngine:
        """:meth:`_enter` for a plan, which also counts it. Refused plans count too, so ranks agree on the number."""
        engine = self._open()
        if self._unfinished is not None:
            with suppress(DeepEPMoEError):  # the error of a plan that was never used
                self._unfinished.known_sizes()
        self.domain.raise_failure()
        self._plans += 1
        return engine

    def _enter_stream(self) -> int:
        stream = self.domain.enter_stream()
        if self.domain.captured:
            self._open().keep_scratch()
        return stream

    def _check_limits(self, num_experts: int, topk: int) -> None:
        if topk > _C.MAX_TOPK:
            raise InputError("topk_idx", f"top-k {topk}", f"the nvlink backend serves at most {_C.MAX_TOPK}")
        if num_experts > _C.MAX_EXPERTS:
            raise InputError("num_experts", num_experts, f"the nvlink backend serves at most {_C.MAX_EXPERTS}")

    def _row_bytes(self, argument: str, x: Tensor, dtype: torch.dtype) -> int:
        row_bytes = x.shape[1] * dtype.itemsize
        if row_bytes % VECTOR_BYTES:
            raise InputError(
                argument,
                f"shape {tuple(x.shape)} as {dtype}",
                f"a row of {row_bytes} bytes must be a multiple of {VECTOR_BYTES} bytes on the nvlink backend",
            )
        return row_bytes


def _readable(x: Tensor) -> Tensor:
    """``x`` as dispatch reads it: aligned rows, which need not be adjacent."""
    if x.stride(1) == 1 and x.stride(0) * x.element_size() % VECTOR_BYTES == 0 and x.data_ptr() % VECTOR_BYTES == 0:
        return x
    return aligned(x)


def _dispatch_send_blocks(blocks: int, ranks: int) -> int:
    """Blocks that send before they receive: a third of a small grid, at most 24, which saturate the link."""
    return 0 if ranks == 1 else max(1, min(24, blocks // 3))


def _combine_send_blocks(blocks: int, ranks: int, grouped: bool) -> int:
    """Blocks that send before they receive. A sender also sums rows (several per token in expert layout), so
    saturating the link takes more blocks than in a dispatch."""
    if ranks == 1:
        return 0
    most, enough = (blocks * 7 // 12, 28) if grouped else (blocks // 2, 24)
    return max(1, min(most, max(enough, blocks // 4)))
