"""ElasticBuffer: the part of the DeepEP 2.x interface that trainers use, such as DeepSpeed's AutoEP.

One buffer serves all layers. A handle owns its routing, so it stays valid after later dispatches. A dispatch returns
rank layout, as in DeepEP 1.x, or with ``do_expand`` expert layout, rows grouped by local expert (see
:mod:`deepep_moe.backends.base`). The order of rows depends on the routing only, so a cached dispatch repeats it
exactly. Padding rows are always zero.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from deepep_moe.backends import Backend, Layout, Plan, Rows, get_backend
from deepep_moe.backends.checks import check_integer, check_num_experts, check_shape, check_tensor, describe
from deepep_moe.buffer import Buffer, bias_tensors, tokens_and_scales
from deepep_moe.config import DispatcherConfig
from deepep_moe.errors import HandleError, InputError
from deepep_moe.events import EventHandle, EventOverlap, StreamRunner
from deepep_moe.fp8 import BLOCK
from deepep_moe.shared import Shared

_SCALE_COLUMN_ALIGNMENT = 4  # entries of 4 bytes: TMA needs column strides that are multiples of 16 bytes


@dataclass(frozen=True, eq=False)
class EPHandle:
    """Routing of one dispatch. Symbols as in :mod:`deepep_moe.backends.base`."""

    do_expand: bool
    num_experts: int
    expert_alignment: int
    num_max_tokens_per_rank: int
    num_sms: int
    topk_idx: Tensor
    """[T, K], the argument of dispatch."""
    num_recv_tokens: int
    """N, rows of the rank layout; with ``do_cpu_sync=False``, the rows allocated."""
    num_expanded_tokens: int
    """M, rows of the expert layout; with ``do_cpu_sync=False``, the rows allocated."""
    num_recv_tokens_per_expert_list: list[int]
    """Rows of each local expert including padding; empty with ``do_cpu_sync=False``."""
    psum_num_recv_tokens_per_scaleup_rank: Tensor
    """[R] int32: end of the rows of each source rank in rank layout."""
    psum_num_recv_tokens_per_expert: Tensor
    """[L] int32: end of each local expert's group, including padding, in expert layout."""
    num_unaligned_recv_tokens_per_expert: Tensor
    """[L] int32: rows of each local expert without padding."""
    recv_src_metadata: Tensor
    """[N] int32: token index of the row at its source rank."""
    dst_buffer_slot_idx: Tensor
    """[T, R] int32: index of the token among those sent to the rank, or -1."""
    plan: Plan
    owner: object

    def memory(self) -> list[Tensor]:
        """Tensors that cover the memory of the handle and of its plan on the device."""
        return [*self.plan.memory(), *(value for value in vars(self).values() if isinstance(value, Tensor))]


class ElasticBuffer(Shared):
    """Communication buffer of one expert-parallel group.

    Args:
        group: the process group. Its torch.distributed backend determines the device: CUDA with nccl, CPU with gloo.
        num_bytes: value of the attribute of this name; staging memory is sized automatically. Default:
            :meth:`get_buffer_size_hint`.
        num_max_tokens_per_rank: initial size of staging, in tokens of one rank; needed by dispatches with
            ``do_cpu_sync=False``.
        num_gpu_timeout_secs: longest wait for a peer, in seconds.
        hidden, num_topk, use_fp8_dispatch, allow_multiple_reduction: used for the size hint only.
        deterministic: accepted for compatibility; results are always deterministic.
        num_cpu_bytes, allow_hybrid_mode, prefer_overlap_with_compute, sl_idx: accepted, no effect here.
        num_allocated_qps, num_cpu_timeout_secs, explicitly_destroy: accepted, no effect here.
        settings: configuration from a framework integration; default: ``DispatcherConfig.load()``. Its
            ``max_tokens_per_rank`` is replaced by ``num_max_tokens_per_rank``.
    """

    def __init__(
        self,
        group: dist.ProcessGroup,
        num_bytes: int | None = None,
        num_cpu_bytes: int = 0,
        num_max_tokens_per_rank: int = 0,
        hidden: int = 0,
        num_topk: int = 0,
        use_fp8_dispatch: bool = False,
        deterministic: bool = False,
        allow_hybrid_mode: bool = True,
        allow_multiple_reduction: bool = True,
        prefer_overlap_with_compute: bool = True,
        sl_idx: int = 3,
        num_allocated_qps: int = 0,
        num_cpu_timeout_secs: int = 300,
        num_gpu_timeout_secs: int = 100,
        explicitly_destroy: bool = False,
        *,
        settings: DispatcherConfig | None = None,
    ) -> None:
        if settings is None:
            config = DispatcherConfig.load(
                {"max_tokens_per_rank": num_max_tokens_per_rank, "timeout_seconds": num_gpu_timeout_secs}
            )
        else:
            config = replace(settings, max_tokens_per_rank=num_max_tokens_per_rank)
        config = replace(config, capacity_factor=0.0)  # here do_cpu_sync=False fixes sizes
        self._backend: Backend | None = get_backend(group, None, config)
        self.group = self._backend.group
        self.rank_idx, self.num_ranks = self._backend.rank, self._backend.world_size
        self.num_max_tokens_per_rank = num_max_tokens_per_rank
        if num_bytes is None:
            num_bytes = self.get_buffer_size_hint(
                self.group, num_max_tokens_per_rank, hidden, num_topk, use_fp8_dispatch
            )
        self.num_bytes = num_bytes
        self._runner = StreamRunner(self._backend.device)
        self._identity = object()

    @staticmethod
    def get_buffer_size_hint(
        group: dist.ProcessGroup,
        num_max_tokens_per_rank: int,
        hidden: int,
        num_topk: int = 0,
        use_fp8_dispatch: bool = False,
        allow_hybrid_mode: bool = True,
        allow_multiple_reduction: bool = True,
    ) -> int:
        """Bytes of staging memory for two calls in flight with BF16 rows (combine never sends FP8)."""
        row = 2 * hidden + 4 * -(-hidden // BLOCK) * use_fp8_dispatch + 4 * num_topk
        return 2 * dist.get_world_size(group) * num_max_tokens_per_rank * row

    @staticmethod
    def capture() -> EventHandle:
        """An event recorded on the current stream, for ``previous_event``."""
        return EventHandle()

    @staticmethod
    def get_theoretical_num_sms(num_experts: int, num_topk: int, *args: Any, **kwargs: Any) -> int:
        """SMs to reserve for communication: the configured number, else the default of DeepEP 1.x."""
        return DispatcherConfig.load().num_sms or Buffer.num_sms

    @staticmethod
    def get_theoretical_num_qps(num_sms: int) -> int:
        """RDMA queue pairs to allocate: 0, because none are used."""
        return 0

    def get_comm_stream(self) -> torch.cuda.Stream:
        """The stream that asynchronous calls run on. Raises UnsupportedError on a CPU."""
        self._open()
        return self._runner.stream

    def barrier(self, use_comm_stream: bool = True, with_cpu_sync: bool = False) -> None:
        """Wait until all ranks of the group have made this call.

        Args:
            use_comm_stream: accepted for compatibility.
            with_cpu_sync: also wait for all work on this rank's GPU.

        Raises:
            PeerTimeoutError: names the ranks that did not call in time.
            RankMismatchError: another rank is in another call.
        """
        backend = self._open()
        device = backend.device
        backend.barrier()
        if with_cpu_sync and device.type == "cuda":
            torch.cuda.synchronize(device)

    def destroy(self) -> None:
        """Release the backend. Idempotent; later calls of this buffer raise HandleError."""
        self._backend = None

    def dispatch(
        self,
        x: Tensor | tuple[Tensor, Tensor],
        topk_idx: Tensor | None = None,
        topk_weights: Tensor | None = None,
        cumulative_local_expert_recv_stats: Tensor | None = None,
        num_experts: int | None = None,
        num_max_tokens_per_rank: int | None = None,
        expert_alignment: int | None = None,
        num_sms: int = 0,
        num_qps: int = 0,
        previous_event: EventOverlap | EventHandle | None = None,
        previous_event_before_epilogue: EventOverlap | EventHandle | None = None,
        async_with_compute_stream: bool = False,
        allocate_on_comm_stream: bool = False,
        handle: EPHandle | None = None,
        do_handle_copy: bool = True,
        do_cpu_sync: bool | None = None,
        do_expand: bool = False,
        do_zero_padding: bool = False,
        use_tma_aligned_col_major_sf: bool = False,
    ) -> tuple[Tensor | tuple[Tensor, Tensor], Tensor | None, Tensor | None, EPHandle, EventOverlap]:
        """Send each token to the ranks of its experts. Collective.

        Args:
            x: [T, H] bf16, fp16 or fp32, or (e4m3 [T, H], scales [T, H / 128] of any strides).
            topk_idx: [T, K] int32 or int64, -1 = dropped route. Needs ``num_experts``; not together with ``handle``.
            topk_weights: [T, K] float32; allowed with ``handle`` too.
            cumulative_local_expert_recv_stats: [L] int32 or int64; the rows of each local expert are added to it.
            num_experts: E, a multiple of R; needed with ``topk_idx``.
            num_max_tokens_per_rank: upper bound on T, equal on all ranks; a batch with more tokens is an InputError.
                Default: the buffer's, which is a bound with ``do_cpu_sync=False`` only.
            expert_alignment: groups of the expert layout are padded with zero rows to a multiple; default 1.
            handle: repeat the routing of an earlier dispatch.
            do_cpu_sync: False: outputs have the largest possible number of rows and the host does not wait.
            do_expand: return the expert layout.
            do_handle_copy: copy ``topk_idx`` into the handle instead of referring to it.
            use_tma_aligned_col_major_sf: return scales column-major, columns aligned to 16 bytes.
            previous_event, previous_event_before_epilogue: start after these events instead of after the work on the
                current stream.
            async_with_compute_stream: do not make the current stream wait; wait for the returned event before using
                results.
            allocate_on_comm_stream: accepted together with a previous event and ``async_with_compute_stream``.
            num_sms, num_qps, do_zero_padding: accepted for compatibility.

        Returns:
            received rows (or with scales); recv_topk_idx [N, K] local experts, -1 if the expert is on another rank,
            None with ``do_expand``; weights [N, K], or [M] with ``do_expand``, None without ``topk_weights``; the
            handle; the event.

        Raises:
            InputError, HandleError: wrong arguments, or a handle of another or a destroyed buffer.
            RankMismatchError, PeerError: ranks disagree, or another rank refused its input or died.
        """
        backend = self._open()
        previous_events = (previous_event, previous_event_before_epilogue)
        alignment = 1 if expert_alignment is None else expert_alignment
        bound, stats = num_max_tokens_per_rank or self.num_max_tokens_per_rank, cumulative_local_expert_recv_stats
        worst_case = do_cpu_sync is False and handle is None
        try:
            tokens, scales = tokens_and_scales(x)
            self._runner.check(previous_events, async_with_compute_stream, allocate_on_comm_stream)
            check_integer("num_max_tokens_per_rank", bound, least=1 if worst_case else 0)
            if (worst_case or num_max_tokens_per_rank) and tokens.shape[0] > bound:
                raise InputError("x", f"{tokens.shape[0]} tokens", f"num_max_tokens_per_rank is {bound}")
            check_integer("expert_alignment", alignment, least=1)
            if (handle is None) == (topk_idx is None):
                raise InputError("topk_idx", "missing" if handle is None else "given", "give either topk_idx or handle")
            if handle is not None:
                self._check_owner(handle)
                experts = handle.num_experts
            else:
                check_shape("topk_idx", topk_idx, (None, None), backend.device)
                if num_experts is None:
                    raise InputError("num_experts", None, "is needed with topk_idx")
                check_num_experts(num_experts, self.num_ranks)
                experts = num_experts
            if stats is not None:
                _check_stats(stats, experts // self.num_ranks, backend.device)
        except Exception as error:
            backend.refuse("plan" if handle is None else "dispatch", error)

        def call() -> tuple[Rows, Tensor | None, EPHandle]:
            """Creates everything that is returned, so that the event covers it."""
            if handle is not None:
                plan = handle.plan
            else:
                assert topk_idx is not None
                max_recv, max_rows = None, None
                if worst_case:
                    max_recv, max_rows = self._worst_case(topk_idx, experts, bound, alignment)
                plan = backend.plan(topk_idx, experts, alignment=alignment, max_recv=max_recv, max_rows=max_rows)
            rows = backend.dispatch(plan, tokens, layout=_layout(do_expand), scales=scales, weights=topk_weights)
            if use_tma_aligned_col_major_sf and rows.scales is not None:
                rows = rows._replace(scales=_column_major(rows.scales))
            if stats is not None:
                stats.add_(plan.expert_counts)
            if handle is not None:
                made = handle if handle.do_expand == do_expand else replace(handle, do_expand=do_expand)
            else:
                assert topk_idx is not None
                kept = topk_idx.clone() if do_handle_copy else topk_idx
                made = self._handle(plan, kept, do_expand, bound, num_sms)
            recv_topk_idx = None if do_expand else plan.recv_topk_idx.to(made.topk_idx.dtype)
            return rows, recv_topk_idx, made

        (rows, recv_topk_idx, made), event = self._runner.run(
            call,
            previous_event=previous_events,
            async_finish=async_with_compute_stream,
            allocate_on_comm_stream=allocate_on_comm_stream,
            reads=(tokens, scales, topk_idx, topk_weights, stats, *(handle.plan.memory() if handle else ())),
            made=lambda result: (*result[0], result[1], *result[2].memory()),
        )
        return (
            rows.x if rows.scales is None else (rows.x, rows.scales),
            recv_topk_idx,
            rows.weights,
            made,
            event,
        )

    def combine(
        self,
        x: Tensor,
        handle: EPHandle,
        topk_weights: Tensor | None = None,
        bias: Tensor | tuple[Tensor, Tensor] | None = None,
        num_sms: int = 0,
        num_qps: int = 0,
        previous_event: EventOverlap | EventHandle | None = None,
        previous_event_before_epilogue: EventOverlap | EventHandle | None = None,
        async_with_compute_stream: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple[Tensor, Tensor | None, EventOverlap]:
        """Sum the rows of each token at the rank it came from, in fp32 and a fixed order. Collective.

        Args:
            x: rows in the layout of the handle: [N, H], or [M, H] after ``do_expand``. Weights are not applied.
            handle: from the dispatch that sent the tokens.
            topk_weights: [N, K] or [M] float32 in the same layout, sent back and returned as [T, K].
            bias: one or two [T, H] tensors of the rows' dtype, added to the result.
            num_sms, num_qps: accepted for compatibility.
            previous_event, previous_event_before_epilogue, async_with_compute_stream, allocate_on_comm_stream: see
                :meth:`dispatch`.

        Returns:
            combined rows [T, H]; combined weights [T, K] or None; the event.

        Raises:
            InputError, HandleError, RankMismatchError, PeerError: as for :meth:`dispatch`.
        """
        backend = self._open()
        previous_events = (previous_event, previous_event_before_epilogue)
        try:
            check_tensor("x", x)
            biases = bias_tensors(bias)
            self._runner.check(previous_events, async_with_compute_stream, allocate_on_comm_stream)
            self._check_owner(handle)
        except Exception as error:
            backend.refuse("combine", error)
        plan, layout = handle.plan, _layout(handle.do_expand)
        tokens, event = self._runner.run(
            lambda: backend.combine(plan, x, layout=layout, weights=topk_weights, bias=biases),
            previous_event=previous_events,
            async_finish=async_with_compute_stream,
            allocate_on_comm_stream=allocate_on_comm_stream,
            reads=(x, topk_weights, *biases, *plan.memory()),
            made=lambda result: result,
        )
        return tokens.x, tokens.weights, event

    def _worst_case(self, topk_idx: Tensor, num_experts: int, tokens: int, alignment: int) -> tuple[int, int]:
        """Upper bounds on received rows and expert rows, valid unless a token names an expert twice."""
        local_experts = num_experts // self.num_ranks
        received = self.num_ranks * tokens
        rows = received * min(topk_idx.shape[-1], local_experts) + local_experts * (alignment - 1)
        return received, -(-rows // alignment) * alignment

    def _handle(self, plan: Plan, topk_idx: Tensor, do_expand: bool, max_tokens: int, num_sms: int) -> EPHandle:
        host = plan.expert_counts_host
        return EPHandle(
            do_expand=do_expand,
            num_experts=plan.num_experts,
            expert_alignment=plan.alignment,
            num_max_tokens_per_rank=max_tokens,
            num_sms=num_sms,
            topk_idx=topk_idx,
            num_recv_tokens=plan.num_recv,
            num_expanded_tokens=plan.num_rows,
            num_recv_tokens_per_expert_list=[]
            if host is None
            else [-(-count // plan.alignment) * plan.alignment for count in host.tolist()],
            psum_num_recv_tokens_per_scaleup_rank=plan.rank_prefix[:, self.rank_idx].to(torch.int32),
            psum_num_recv_tokens_per_expert=plan.expert_offsets[1:].to(torch.int32),
            num_unaligned_recv_tokens_per_expert=plan.expert_counts.to(torch.int32),
            recv_src_metadata=plan.recv_src_idx.contiguous(),
            dst_buffer_slot_idx=plan.send_slot,
            plan=plan,
            owner=self._identity,
        )

    def _open(self) -> Backend:
        if self._backend is None:
            raise HandleError("this ElasticBuffer was destroyed; make a new one")
        return self._backend

    def _check_owner(self, handle: Any) -> None:
        if not isinstance(handle, EPHandle):
            raise HandleError(f"handle is {describe(handle)}; pass on the object that dispatch returned")
        if handle.owner is not self._identity:
            raise HandleError("the handle was made by another ElasticBuffer")


def _check_stats(stats: Tensor, local_experts: int, device: torch.device) -> None:
    name = "cumulative_local_expert_recv_stats"
    check_shape(name, stats, (local_experts,), device)
    if stats.dtype not in (torch.int32, torch.int64):
        raise InputError(name, stats.dtype, "must be int32 or int64")
    if local_experts > 1 and stats.stride(0) == 0:
        raise InputError(name, "an expanded tensor", "must have memory of its own for each expert")
    if stats.is_inference() and not torch.is_inference_mode_enabled():
        raise InputError(name, "an inference tensor", "must be one that can be changed outside of inference_mode")


def _layout(do_expand: bool) -> Layout:
    return Layout.BY_EXPERT if do_expand else Layout.BY_SOURCE


def _column_major(scales: Tensor) -> Tensor:
    rows, columns = scales.shape
    pitch = -(-rows // _SCALE_COLUMN_ALIGNMENT) * _SCALE_COLUMN_ALIGNMENT
    return scales.new_empty((columns, pitch)).t()[:rows].copy_(scales)
