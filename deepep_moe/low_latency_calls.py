"""The low-latency calls of :class:`~deepep_moe.buffer.Buffer`, with DeepEP's names, arguments and results.

What they do and where is in low_latency.py; docs/decode.md shows how they are used.
"""

from __future__ import annotations

from collections.abc import Callable

import torch.distributed as dist
from torch import Tensor

from deepep_moe.backends import Backend
from deepep_moe.events import EventOverlap, StreamRunner
from deepep_moe.low_latency import LowLatency, LowLatencyHandle
from deepep_moe.tracing import not_compiled, uncompiled

Hook = Callable[[], None]


class LowLatencyCalls:
    """Mixed into Buffer: needs what is declared here of it."""

    group: dist.ProcessGroup
    enable_shrink: bool
    num_rdma_bytes: int
    _low_latency_sms: int
    _runner: StreamRunner
    _low_latency: LowLatency | None = None
    _open: Callable[[], Backend]

    def low_latency_dispatch(
        self,
        x: Tensor,
        topk_idx: Tensor,
        num_max_dispatch_tokens_per_rank: int,
        num_experts: int,
        cumulative_local_expert_recv_stats: Tensor | None = None,
        dispatch_wait_recv_cost_stats: Tensor | None = None,
        use_fp8: bool = True,
        round_scale: bool = False,
        use_ue8m0: bool = False,
        async_finish: bool = False,
        return_recv_hook: bool = False,
    ) -> tuple[Tensor | tuple[Tensor, Tensor], Tensor, LowLatencyHandle, EventOverlap, Hook | None]:
        """Send tokens to their experts, at places that need no exchange of sizes. Collective; no host wait.

        L = ``num_experts`` / R local experts, R ranks, M = ``num_max_dispatch_tokens_per_rank``. The first call with a
        new M or hidden size allocates (collectively), and cannot be captured in a CUDA graph.

        Args:
            x: [T, H] bf16, contiguous, its address a multiple of 16, T <= M (0 and different per rank allowed); H a
                multiple of 128 with FP8, else of 8.
            topk_idx: [T, K] int32 or int64, contiguous, K <= 32, experts of a token differ, -1 = dropped.
            num_max_dispatch_tokens_per_rank: equal on all ranks, at most 32768.
            num_experts: of the group, a multiple of R, at most 1024.
            cumulative_local_expert_recv_stats: [L] int32, received rows are added.
            dispatch_wait_recv_cost_stats: [R] int64, nanoseconds that the receiving kernel waited for each rank are
                added (0 on CPUs).
            use_fp8: rows travel and arrive as e4m3 with scales = amax of 128 channels (at least 1e-4) / 448.
            round_scale: with ``use_fp8``: scales are rounded up to powers of two.
            use_ue8m0: with ``round_scale``: scales come as their exponents, four in an int32.
            async_finish: run on the communication stream; wait for the returned event. Not with a hook.
            return_recv_hook: only send; calling the returned hook receives. At most two calls in flight.

        Returns:
            rows [L, R * M, H] bf16, or (e4m3, scales [L, R * M, H / 128] fp32 or [L, R * M, H / 512 rounded up] int32,
            both with tokens contiguous); rows of each expert [L] int32, the ones beyond are undefined; the handle
            (src_info [L, R * M] int32, layout_range [L, R] int64 = first row << 32 | rows, M, H, num_experts); the
            event; the hook or None. Rows of an expert are ordered by source rank, then token.

        Raises:
            InputError: an argument; the other ranks get a PeerError.
            HandleError: a third call in flight; the other ranks get a PeerError. The oldest call is received, so that
                its hook has nothing left to do.
            RankMismatchError, PeerTimeoutError, PeerError: ranks differ, or one does not answer (then masked instead,
                with ``enable_shrink``). On GPUs a kernel notices; the next call or ``low_latency_check`` raises.
        """
        calls = self._low_latency or self._opened()
        call, handle, event, hook = uncompiled(LowLatency.dispatch)(
            calls,
            x,
            topk_idx,
            num_max_dispatch_tokens_per_rank,
            num_experts,
            cumulative_local_expert_recv_stats,
            dispatch_wait_recv_cost_stats,
            (use_fp8, round_scale, use_ue8m0),
            async_finish,
            return_recv_hook,
        )
        return (call.rows if call.scales is None else (call.rows, call.scales)), call.counts, handle, event, hook

    def low_latency_combine(
        self,
        x: Tensor,
        topk_idx: Tensor,
        topk_weights: Tensor,
        handle: LowLatencyHandle,
        use_logfmt: bool = False,
        zero_copy: bool = False,
        async_finish: bool = False,
        return_recv_hook: bool = False,
        out: Tensor | None = None,
        combine_wait_recv_cost_stats: Tensor | None = None,
    ) -> tuple[Tensor, EventOverlap, Hook | None]:
        """Sum the weighted rows of each token where it came from. Collective; no host wait.

        Args:
            x: [L, R * M, H] bf16, contiguous, rows where the dispatch put them; not read with ``zero_copy``.
            topk_idx: [T, K], contiguous, that of the dispatch; entries may have become -1, those add nothing.
            topk_weights: [T, K] float32.
            handle: of the dispatch; may be combined more than once.
            use_logfmt: accepted; rows travel as BF16, which is more accurate.
            zero_copy: the rows are in ``get_next_low_latency_combine_buffer(handle)``.
            async_finish, return_recv_hook: as in :meth:`low_latency_dispatch`.
            out: [T, H] bf16, contiguous, not in the memory of ``x``: filled and returned instead of a new tensor.
            combine_wait_recv_cost_stats: [R] int64, as in :meth:`low_latency_dispatch`.

        Returns:
            [T, H] bf16; the event; the hook or None. A token without routes is 0.

        Raises:
            As :meth:`low_latency_dispatch`.
        """
        calls = self._low_latency or self._opened()
        return uncompiled(LowLatency.combine)(
            calls,
            x,
            topk_idx,
            topk_weights,
            handle,
            zero_copy,
            async_finish,
            return_recv_hook,
            out,
            combine_wait_recv_cost_stats,
        )

    @not_compiled
    def get_next_low_latency_combine_buffer(self, handle: LowLatencyHandle) -> Tensor:
        """[L, R * M, H] bf16 to write the rows of the next combine of ``handle`` into, then combine with ``zero_copy``.

        Combine sums a rank's rows before it sends, so this saves nothing over passing a tensor of your own. The memory
        is allocated at the first call. At most two are handed out at a time, each until it is combined or its handle is
        dropped.
        """
        return self._opened().next_combine_buffer(handle)

    @not_compiled
    def clean_low_latency_buffer(self, num_max_dispatch_tokens_per_rank: int, hidden: int, num_experts: int) -> None:
        """Nothing needs cleaning between calls of any kind: checks the arguments, and raises what kernels reported."""
        self._opened().clean(num_max_dispatch_tokens_per_rank, hidden, num_experts)

    @not_compiled
    def low_latency_check(self) -> None:
        """Raise what the kernels that have run so far reported (the next call does so too). Not in DeepEP."""
        self._opened().check()

    @not_compiled
    def low_latency_update_mask_buffer(self, rank_to_mask: int, mask: bool = False) -> None:
        """Mask a rank: nothing is sent to it, its tokens count as none. Or end that; then all ranks must call.

        With ``mask=False`` this is :meth:`low_latency_clean_mask_buffer` for one rank.
        """
        self._opened().update_mask(rank_to_mask, mask)

    @not_compiled
    def low_latency_query_mask_buffer(self, mask_status: Tensor) -> None:
        """Fill ``mask_status [R]`` int32: 1 for masked ranks, in the order of the current stream."""
        self._opened().query_mask(mask_status)

    @not_compiled
    def low_latency_clean_mask_buffer(self) -> None:
        """End all masks. Collective: ranks meet, so that all go on with the same call and nothing old in memory.

        A rank that does not come within the timeout is masked again.
        """
        self._opened().clean_mask()

    @not_compiled
    def _opened(self) -> LowLatency:
        """The low-latency calls of this buffer; made at the first call, on all ranks."""
        backend = self._open()
        if self._low_latency is None:
            self._low_latency = LowLatency(
                backend, self._low_latency_sms, self.enable_shrink, self._runner, self.num_rdma_bytes
            )
        return self._low_latency

    def _close_low_latency(self) -> None:
        if self._low_latency is not None:
            self._low_latency.close()
            self._low_latency = None
