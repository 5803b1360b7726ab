"""One NVLink domain, our kernels: peers write each other's memory, the host only launches.

How one batch travels (csrc/kernels has the device side of each step):

* :meth:`NVLinkBackend.plan` counts tokens, exchanges the counts through peer memory and places every row. The host
  waits once, for the numbers that size the outputs, and only where it makes these (nvlink_plan.py); with ``max_recv``
  it does not wait and can be captured.
* :meth:`NVLinkBackend.dispatch` and :meth:`NVLinkBackend.combine` are one kernel each. Rows in flight lie in
  staging, double-buffered by epoch, so no barrier separates calls.

Kernels never wait longer than ``timeout_seconds``; what went wrong is in pinned memory and raised by the next call.
"""

from __future__ import annotations

import logging
import os
import socket
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
from deepep_moe.backends.nvlink_plan import DevicePlan, addresses
from deepep_moe.config import DispatcherConfig
from deepep_moe.errors import (
    CapacityError,
    DeepEPMoEError,
    HandleError,
    InputError,
    PeerError,
    PeerTimeoutError,
    RankMismatchError,
)
from deepep_moe.extension import _C, DTYPE_CODES, VECTOR_BYTES, why_missing
from deepep_moe.peer_memory import PeerMemory

_log = logging.getLogger(__name__)

_CHANNELS_PER_SCALE = 128
_MOST_EARLY_WORDS = 2 << 20  # int32 words of a plan that are allocated before it is known how many are needed

# enum Format, enum Failure, enum Phase, PeerCounts::Field and Operation::Field of csrc/kernels/args.h
_AS_GIVEN, _TO_FP8, _THROUGH_FP8 = range(3)
_TIMEOUT, _PEER_FAILED, _MISMATCH, _BAD_EXPERT, _RECV_OVERFLOW, _ROWS_OVERFLOW, _STAGING, _BAD_PEER_INPUT = range(1, 9)
_PHASES = (
    "plan (exchanging counts)",
    "plan (placing rows)",
    "dispatch (start)",
    "dispatch (rows)",
    "combine (start)",
    "combine (rows)",
)
_FIELDS = (
    "num_experts",
    "top-k",
    "expert alignment",
    "number of tokens",
    "validity",
    "max_recv",
    "max_rows",
    "operation",
    "staged row bytes",
)


class NVLinkBackend:
    """:class:`~deepep_moe.backends.base.Backend` for GPUs that reach each other's memory.

    Args:
        group: the expert-parallel process group, of any kind and any members; it is used only to set up.
        device: this rank's GPU.
        config: ``num_sms``, ``max_tokens_per_rank``, ``timeout_seconds`` and ``debug_waits`` apply.
    """

    name = "nvlink"

    def __init__(self, group: dist.ProcessGroup, device: torch.device, config: DispatcherConfig) -> None:
        self.group, self.device, self.config = group, device, config
        self.number, self._plans = new_backend_number(), 0
        self.rank, self.world_size = dist.get_rank(group), dist.get_world_size(group)
        self._device_index: int = device.index
        self.num_sms = torch.cuda.get_device_properties(device).multi_processor_count
        self._runtime: _C.Buffer | None = _C.Buffer(
            self.rank, self.world_size, self._device_index, config.timeout_seconds, config.debug_waits
        )
        self._control: PeerMemory | None = PeerMemory(group, device, _C.Buffer.control_bytes())
        self._runtime.set_control(self._control.addresses)
        self._staging: PeerMemory | None = None
        self._staging_tokens = self._staging_topk = self._staging_pitch = 0
        self._last_stream: torch.cuda.Stream | None = None
        self._last_stream_address = -1
        self._unfinished: DevicePlan | None = None  # the host has not waited for its numbers yet

    @staticmethod
    def supports(group: dist.ProcessGroup, device: torch.device) -> str | None:
        """The reason this rank cannot use the backend, or None. Collective where ``device`` is a GPU."""
        if device.type != "cuda":
            return f"nvlink needs CUDA tensors, the device is {device}"
        ranks = dist.get_world_size(group)
        places: list[tuple[str, int]] = [("", 0)] * ranks
        dist.all_gather_object(places, (_host_id(), device.index), group=group)
        if why_missing is not None:
            return why_missing
        if ranks > _C.MAX_RANKS:
            return f"the group has {ranks} ranks, one NVLink domain is served up to {_C.MAX_RANKS}"
        elsewhere = sorted({host for host, _ in places if host != places[dist.get_rank(group)][0]})
        if elsewhere:
            return "ranks of the group are on several hosts"
        for peer, (_, index) in enumerate(places):
            # Under CUDA_VISIBLE_DEVICES a peer's GPU may have no index here; then mapping its memory is the test.
            if index < torch.cuda.device_count() and index != device.index:
                if not torch.cuda.can_device_access_peer(device, index):
                    return f"{device} has no peer access to cuda:{index} of rank {peer}"
        return None

    @property
    def usable(self) -> bool:
        return self._runtime is not None and self._runtime.take_failure(True) is None

    # -- planning ------------------------------------------------------------------------------------------------

    def destinations(self, topk_idx: Tensor, num_experts: int) -> Destinations:
        runtime = self._open()
        check_topk_idx(topk_idx, num_experts, self.world_size, self.device)
        self._check_limits(num_experts, topk_idx.shape[1])
        topk_idx = topk_idx.to(torch.int64).contiguous()
        tokens, topk = topk_idx.shape
        counts = torch.zeros(self.world_size + num_experts, dtype=torch.int32, device=self.device)
        per_rank, per_expert = counts.split([self.world_size, num_experts])
        in_rank = torch.empty((tokens, self.world_size), dtype=torch.bool, device=self.device)
        runtime.layout(
            topk_idx.data_ptr(),
            tokens,
            topk,
            num_experts,
            self.world_size,
            per_rank.data_ptr(),
            0,
            per_expert.data_ptr(),
            in_rank.data_ptr(),
            torch.cuda.current_stream(self.device).cuda_stream,
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
        runtime = self._open()
        self._plans += 1  # refused ones too: the number is equal on all ranks
        identity = (self.number, self._plans)
        if self._unfinished is not None:
            with suppress(DeepEPMoEError):  # of a plan whose dispatch was refused: that has been raised
                self._unfinished.known_sizes()
        try:
            check_plan_inputs(
                topk_idx, num_experts, alignment, is_token_in_rank, num_tokens_per_expert, self.world_size, self.device
            )
            self._check_limits(num_experts, 0 if topk_idx is None else topk_idx.shape[1])
        except DeepEPMoEError:
            self._refuse_plan()
            raise
        if topk_idx is not None:
            tokens, topk = topk_idx.shape
            topk_idx = topk_idx.to(torch.int64).contiguous()
        else:
            assert is_token_in_rank is not None
            tokens, topk = is_token_in_rank.shape[0], 0
            topk_idx = torch.empty((tokens, 0), dtype=torch.int64, device=self.device)
        if is_token_in_rank is not None:
            is_token_in_rank = is_token_in_rank.contiguous()
        local_experts = num_experts // self.world_size
        stream = self._enter_stream()

        wait = max_recv is None
        if not wait:
            # All ranks size staging alike without asking each other: by the configured maximum.
            self._reserve(max(self.config.max_tokens_per_rank, self._staging_tokens, tokens), topk, 0)
        runtime.begin_plan(
            topk_idx.data_ptr(),
            0 if is_token_in_rank is None else is_token_in_rank.data_ptr(),
            0 if num_tokens_per_expert is None else num_tokens_per_expert.data_ptr(),
            tokens,
            topk,
            num_experts,
            alignment,
            False,
            wait,
            max_recv or 0,
            max_rows or 0,
            stream,
        )
        if max_recv is not None:
            plan = DevicePlan(
                num_experts, alignment, identity, topk_idx, self.world_size, sizes=(max_recv, max_rows or 0)
            )
            self._place(plan, *plan.known_sizes(), stream)
            return plan
        plan = DevicePlan(num_experts, alignment, identity, topk_idx, self.world_size, finish=self._finish_plan)
        self._unfinished = plan
        # The device knows the sizes long before the host: everything else is enqueued by now, with room for the most.
        most_recv = self.world_size * self._staging_tokens
        most_rows = most_recv * topk + local_experts * (alignment - 1) if topk else 0
        staging_serves = topk <= self._staging_topk and self._staging is not None
        if staging_serves and most_recv * (1 + 2 * topk) + most_rows <= _MOST_EARLY_WORDS:
            self._place(plan, most_recv, most_rows, stream)
        return plan

    def _place(self, plan: DevicePlan, max_recv: int, max_rows: int, stream: int) -> None:
        """Enqueue what follows the counts. The device skips it if a rank has more tokens than staging holds."""
        plan.allocate(max_recv, max_rows)
        self._open().place_plan(*plan.addresses(), max_recv, max_rows, self._blocks(), stream)

    def _finish_plan(self, plan: DevicePlan) -> tuple[int, int]:
        """Wait for N and M of the plan, the last one begun."""
        self._unfinished = None
        numbers = self._open().wait_plan(plan.counts_address)
        if numbers is None:
            self.check()
            raise PeerTimeoutError(
                f"rank {self.rank}: the plan kernel did not run within {self.config.timeout_seconds:g} s; "
                "something before it on this GPU does not end"
            )
        num_recv, num_rows, max_tokens, failed = numbers
        if failed:
            self.check()
        if max_tokens > self._staging_tokens or not plan.is_placed:
            self._reserve(max(self.config.max_tokens_per_rank, max_tokens), plan.num_topk, 0)
            self._place(plan, num_recv, num_rows, self._enter_stream())
        return num_recv, num_rows

    def _refuse_plan(self) -> None:
        """Tell the peers, who are on their way into the exchange, not to wait for this rank."""
        if torch.cuda.is_current_stream_capturing():
            return  # nothing runs: nobody waits
        runtime = self._open()
        runtime.begin_plan(0, 0, 0, 0, 0, self.world_size, 1, True, True, 0, 0, self._enter_stream())
        runtime.wait_plan(0)
        runtime.take_failure(False)  # what it says of the peers follows from this rank's mistake

    def refuse(self, phase: Phase, error: DeepEPMoEError) -> NoReturn:
        if phase == "plan":
            self._plans += 1
            self._refuse_plan()
        raise error

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
    ) -> Rows:
        runtime = self._open()
        check_dispatch(self, plan, x, layout=layout, wire=wire, scales=scales, weights=weights)
        grouped, quantize, dequantize = layout is Layout.BY_EXPERT, wire is not Wire.AS_GIVEN, wire is Wire.E4M3_TO_BF16
        x = x.contiguous()
        hidden = x.shape[1]
        num_scales = hidden // _CHANNELS_PER_SCALE if quantize else 0 if scales is None else scales.shape[1]
        sent_dtype = torch.float8_e4m3fn if quantize else x.dtype
        row_bytes = self._row_bytes("x", x, sent_dtype)
        pitch = _pitch(row_bytes + 4 * num_scales + (4 * plan.num_topk if weights is not None else 0))
        stream = self._enter_stream()
        self._reserve(self._staging_tokens, plan.num_topk, pitch)

        count = plan.num_rows if grouped else plan.num_recv
        out = self._empty(x.dtype if dequantize else sent_dtype, count, hidden)
        out_scales = out_weights = None
        if num_scales and not dequantize:
            kind = torch.float32 if scales is None else scales.dtype
            # Column-major, as block-scaled GEMMs load them: the scales of one channel block lie together.
            if scales is not None and scales.stride(1) == 1:
                out_scales = torch.empty((count, num_scales), dtype=kind, device=self.device)
            else:
                out_scales = torch.empty((num_scales, _pitch(4 * count) // 4), dtype=kind, device=self.device).t()[
                    :count
                ]
        if weights is not None:
            weights = weights.contiguous()
            out_weights = self._empty(torch.float32, count, None if grouped else plan.num_topk)

        self._set_route(plan, grouped)
        blocks = self._blocks()
        runtime.dispatch(
            x.data_ptr(),
            _THROUGH_FP8 if dequantize else _TO_FP8 if quantize else _AS_GIVEN,
            row_bytes,
            pitch,
            0 if scales is None else scales.data_ptr(),
            0 if scales is None else scales.stride(0),
            0 if scales is None else scales.stride(1),
            num_scales,
            0 if weights is None else weights.data_ptr(),
            out.data_ptr(),
            0 if out_scales is None else out_scales.data_ptr(),
            0 if out_scales is None else out_scales.stride(0),
            0 if out_scales is None else out_scales.stride(1),
            0 if out_weights is None else out_weights.data_ptr(),
            blocks,
            _dispatch_send_blocks(blocks, self.world_size),
            stream,
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
    ) -> Tokens:
        runtime = self._open()
        check_combine(self, plan, x, layout=layout, weights=weights, apply_weights=apply_weights, bias=bias)
        grouped = layout is Layout.BY_EXPERT
        x = x.contiguous()
        carry = weights is not None and not apply_weights
        row_bytes = self._row_bytes("x", x, x.dtype)
        pitch = _pitch(row_bytes + (4 * plan.num_topk if carry else 0))
        stream = self._enter_stream()
        self._reserve(self._staging_tokens, plan.num_topk, pitch)

        out = self._empty(x.dtype, plan.num_tokens, x.shape[1])
        out_weights = None
        if weights is not None:
            weights = weights.contiguous()
        if carry:
            out_weights = self._empty(torch.float32, plan.num_tokens, plan.num_topk)
        added = [b.contiguous() for b in bias]
        self._set_route(plan, grouped)
        blocks = self._blocks()
        runtime.combine(
            x.data_ptr(),
            DTYPE_CODES[x.dtype],
            row_bytes,
            pitch,
            0 if weights is None else weights.data_ptr(),
            apply_weights,
            carry,
            added[0].data_ptr() if added else 0,
            added[1].data_ptr() if len(added) > 1 else 0,
            out.data_ptr(),
            0 if out_weights is None else out_weights.data_ptr(),
            blocks,
            _combine_send_blocks(blocks, self.world_size, grouped),
            stream,
        )
        return Tokens(out, out_weights)

    def _set_route(self, plan: Plan, grouped: bool) -> None:
        self._open().set_route(plan.num_tokens, plan.num_topk, plan.num_recv, plan.num_rows, *addresses(plan), grouped)

    # -- memory and streams --------------------------------------------------------------------------------------

    def _reserve(self, tokens: int, topk: int, pitch: int) -> None:
        """Make staging hold ``tokens`` per rank, ``topk`` places and rows of ``pitch`` bytes. Collective if it grows.

        All ranks come to the same answer: the numbers are exchanged by the plan or equal by contract.
        """
        if tokens <= self._staging_tokens and topk <= self._staging_topk and pitch <= self._staging_pitch:
            return
        if self._unfinished is not None:
            self._unfinished.known_sizes()  # it may need what is replaced here
        tokens = max(tokens, self._staging_tokens, 1)
        topk, pitch = max(topk, self._staging_topk), max(pitch, self._staging_pitch)
        num_bytes, _ = _C.Buffer.staging_bytes(self.world_size, tokens, topk, pitch)
        if torch.cuda.is_current_stream_capturing():
            raise CapacityError(
                f"staging must grow to {num_bytes} bytes ({tokens} tokens per rank, rows of {pitch} bytes), which a "
                "CUDA graph cannot capture: set max_tokens_per_rank and run once before capturing"
            )
        torch.cuda.synchronize(self.device)  # kernels still read the old staging
        self._staging = None
        try:
            self._staging = PeerMemory(self.group, self.device, num_bytes)
        except torch.OutOfMemoryError as error:
            raise CapacityError(
                f"no memory for {num_bytes} bytes of staging ({tokens} tokens per rank, rows of {pitch} bytes)"
            ) from error
        self._open().set_staging(self._staging.addresses, tokens, topk, num_bytes)
        self._staging_tokens, self._staging_topk, self._staging_pitch = tokens, topk, pitch
        _log.info(
            "deepep_moe: nvlink staging is %d bytes: %d tokens per rank, rows of %d bytes", num_bytes, tokens, pitch
        )

    def _enter_stream(self) -> int:
        """The current stream, made to follow the last one used: kernels of one backend share staging."""
        address: int = torch._C._cuda_getCurrentRawStream(self._device_index)
        if address != self._last_stream_address:
            stream = torch.cuda.current_stream(self.device)
            if self._last_stream is not None and not torch.cuda.is_current_stream_capturing():
                stream.wait_stream(self._last_stream)
            self._last_stream, self._last_stream_address = stream, address
        return address

    def _blocks(self) -> int:
        """Blocks of a kernel whose blocks fill an SM or wait for peers."""
        return self.config.num_sms or self.num_sms

    def _empty(self, dtype: torch.dtype, rows: int, columns: int | None = None) -> Tensor:
        """torch.empty in half its host time, which counts."""
        if columns is None:
            return torch.empty_strided((rows,), (1,), dtype=dtype, device=self.device)
        return torch.empty_strided((rows, columns), (columns, 1), dtype=dtype, device=self.device)

    # -- checks --------------------------------------------------------------------------------------------------

    def check(self) -> None:
        failure = self._runtime.take_failure(False) if self._runtime is not None else None
        if failure is not None:
            raise self._error(*failure)

    def close(self) -> None:
        if self._runtime is None:
            return
        if self.config.debug_waits:
            self.print_waits()
        torch.cuda.synchronize(self.device)
        self._runtime = self._control = self._staging = self._unfinished = None

    def print_waits(self) -> None:
        """Print how long this rank's warps waited for each rank, in milliseconds (``config.debug_waits``)."""
        waits = ", ".join(f"rank {r}: {s * 1e3:.3f} ms" for r, s in enumerate(self._open().wait_seconds()))
        print(f"deepep_moe: rank {self.rank} waited (summed over warps) for {waits}", flush=True)

    def _open(self) -> _C.Buffer:
        if self._runtime is None:
            raise HandleError("this backend was closed; make a new dispatcher or Buffer")
        # Only what ended the protocol: a rank that raised alone over its input would leave its peers waiting.
        failure = self._runtime.take_failure(True)
        if failure is not None:
            raise self._error(*failure)
        return self._runtime

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

    def _error(self, failure: int, phase: int, peer: int, field: int, expected: int, seen: int) -> DeepEPMoEError:
        where = _PHASES[phase]
        if failure == _TIMEOUT:
            return PeerTimeoutError(
                f"rank {self.rank} waited {self.config.timeout_seconds:g} s for rank {peer} in {where}: "
                f"it is at step {seen}, step {expected} was expected. Destroy this buffer or dispatcher."
            )
        if failure == _PEER_FAILED:
            return PeerError(
                f"rank {peer} gave up (its own error says why) while rank {self.rank} was in {where}. "
                "Destroy this buffer or dispatcher."
            )
        if failure == _MISMATCH:
            return RankMismatchError(
                f"{_FIELDS[field]} differs between ranks in {where}: "
                f"{expected} on rank {self.rank}, {seen} on rank {peer}"
            )
        if failure == _BAD_EXPERT:
            too_many = (
                f"; {seen - expected} routes in a row of a routing map, more than top-k" if seen > expected else ""
            )
            return InputError("topk_idx", seen, f"an expert must be -1 (dropped) or 0 to {expected - 1}{too_many}")
        if failure == _BAD_PEER_INPUT:
            return PeerError(f"rank {peer} has bad input in {where}; its own error says what is wrong")
        if failure == _STAGING:
            needed, _ = _C.Buffer.staging_bytes(self.world_size, seen, self._staging_topk, self._staging_pitch)
            return CapacityError(
                f"a rank has {seen} tokens, staging holds {expected} per rank: {needed} bytes are needed; "
                "set max_tokens_per_rank"
            )
        what, setting = ("received tokens", "max_recv") if failure == _RECV_OVERFLOW else ("expert rows", "max_rows")
        return CapacityError(
            f"rank {peer} needs room for {seen} {what}, but {setting} = {expected}: rows beyond it were dropped"
        )


def _pitch(num_bytes: int) -> int:
    return -(-num_bytes // VECTOR_BYTES) * VECTOR_BYTES


def _dispatch_send_blocks(blocks: int, ranks: int) -> int:
    """Blocks that send first. A third fills the link with few blocks, 24 do with many; then they help to receive."""
    return 0 if ranks == 1 else max(1, min(24, blocks // 3))


def _combine_send_blocks(blocks: int, ranks: int, grouped: bool) -> int:
    """Blocks that send first. Sending sums rows too, in expert layout several: that takes more to fill the link."""
    if ranks == 1:
        return 0
    most, enough = (blocks * 7 // 12, 28) if grouped else (blocks // 2, 24)
    return max(1, min(most, max(enough, blocks // 4)))


def _host_id() -> str:
    """The same on all processes of one host and different elsewhere (hostnames alone repeat in containers)."""
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            return file.read().strip()
    except OSError:
        return f"{socket.gethostname()}-{os.uname().nodename}"
