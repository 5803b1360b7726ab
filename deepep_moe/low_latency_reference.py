"""The reference of the low-latency calls, over torch.distributed: the layouts and sums of the kernels, in PyTorch.

It serves CPUs, and GPUs that cannot map each other's memory (over NCCL; the host waits, so no CUDA graphs there). All
of the exchange happens in the sending half; the receiving half writes what the caller sees.
"""

from __future__ import annotations

from contextlib import suppress
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor

from deepep_moe.backends import Backend
from deepep_moe.backends.base import Phase
from deepep_moe.backends.exchange import Exchange
from deepep_moe.backends.headers import Fact
from deepep_moe.errors import DeepEPMoEError, InputError, UnsupportedError
from deepep_moe.extension import is_capturing
from deepep_moe.fp8 import BLOCK, E4M3_MAX
from deepep_moe.low_latency_engine import CombineCall, DispatchCall, Format, Half

AMAX_FLOOR = 1e-4  # of a block of 128 channels: this format's, whatever other FP8 formats here use


# Dispatches over each group, so far. Not counted by engines, which ranks garbage-collect at different times.
_dispatches: WeakKeyDictionary[dist.ProcessGroup, int] = WeakKeyDictionary()


class _Sent(NamedTuple):
    """Of a dispatch: what this rank sent, and what came."""

    number: int  # of the dispatch, equal on all ranks
    experts: Tensor  # [T, K] int64: a copy of topk_idx, which the caller may change before its combine
    tokens: Tensor  # [S] own tokens, by destination
    send_counts: list[int]
    recv_counts: list[int]
    source: Tensor  # [N] rank of each received row
    token: Tensor  # [N] its token there
    local: Tensor  # [N, K] local expert of each route, -1 elsewhere
    rows: Tensor  # [N, H]
    scales: Tensor | None  # [N, H / 128] fp32
    place: Tensor  # [N, K] row of each route within its expert


class ReferenceEngine:
    """:class:`~deepep_moe.low_latency_engine.Engine` over torch.distributed.

    Masks are those set by hand: nothing is sent to a masked rank, and what it sends is ignored. A rank that died is an
    error here, masks or not: torch.distributed cannot go on without it.

    Like kernels, it writes into any tensor: those of inference mode and those that require gradients.
    """

    name = "reference"

    def __init__(self, backend: Backend) -> None:
        self.device = backend.device
        self._exchange = Exchange(backend.group, backend.device, backend.config.timeout_seconds)
        self.rank, self.world_size = self._exchange.rank, self._exchange.world_size
        self._masked = torch.zeros(self.world_size, dtype=torch.bool, device=self.device)
        self._group = backend.group

    def state_words(self, max_tokens: int, topk: int) -> int:
        return 0

    def signature(self, *tensors: Tensor | None) -> object:
        return None  # on CPUs the checks read the indices too, which differ from call to call

    # -- dispatch ------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def dispatch(self, call: DispatchCall, half: Half) -> None:
        self._refuse_capture()
        if half & Half.SEND:
            call.state = self._send(call)
            call.sent = True
        if half & Half.RECEIVE:
            self._deliver(call, call.state)

    def _refuse_capture(self) -> None:
        if is_capturing(self.device):
            raise UnsupportedError(
                "low-latency calls run on the reference here, whose host waits cannot be captured in a CUDA graph. "
                "`deepep-moe doctor` says what their kernels lack; over several nodes they need rail=nvshmem or "
                "num_rdma_bytes"
            )

    def _facts(self, call: DispatchCall) -> dict[str, Fact]:
        return {
            "tokens per rank (max_tokens_per_rank, num_max_dispatch_tokens_per_rank)": call.shape.max_tokens,
            "hidden size": call.shape.hidden,
            "top-k": call.shape.topk,
            "num_experts": call.shape.num_experts,
            "format (use_fp8, round_scale, use_ue8m0)": call.shape.format,
        }

    def _send(self, call: DispatchCall) -> _Sent:
        local_experts = call.shape.num_experts // self.world_size
        ranks = torch.arange(self.world_size, dtype=torch.int64, device=self.device)
        with self._exchange.agreement("dispatch") as agreement:
            experts = call.topk_idx.to(torch.int64, copy=True)
            owner = torch.where(experts >= 0, experts // local_experts, -1)
            goes = (owner.unsqueeze(2) == ranks).any(1) & ~self._masked  # [T, R]
            destination, tokens = goes.t().nonzero().unbind(1)
            send_counts = destination.bincount(minlength=self.world_size).tolist()
            agreement.facts, agreement.private = self._facts(call), send_counts
        assert agreement.shared is not None
        number = _dispatches[self._group] = _dispatches.get(self._group, 0) + 1
        recv_counts = agreement.shared[:, self.rank].tolist()

        exchange = self._exchange.all_to_all
        with self._exchange.moving("dispatch"):
            rows, scales = quantize(call.x, call.shape.format)
            told = torch.cat([tokens.unsqueeze(1), experts[tokens]], 1)
            told = exchange("dispatch", told, send_counts, recv_counts)
            rows = exchange("dispatch", rows[tokens], send_counts, recv_counts)
            if scales is not None:
                scales = exchange("dispatch", scales[tokens], send_counts, recv_counts)

        source = ranks.repeat_interleave(torch.tensor(recv_counts, dtype=torch.int64, device=self.device))
        here = (told[:, 1:] // local_experts == self.rank) & ~self._masked[source].unsqueeze(1)
        local = torch.where(here, told[:, 1:] - self.rank * local_experts, -1)
        # rows come by source, then token: a route's place is the number of routes to its expert before it
        flat = local.flatten()
        routes = (flat.unsqueeze(1) == torch.arange(local_experts, dtype=torch.int64, device=self.device)).long()
        place = ((routes.cumsum(0) - 1) * routes).sum(1).view_as(local)
        token = told[:, 0]
        return _Sent(number, experts, tokens, send_counts, recv_counts, source, token, local, rows, scales, place)

    def _deliver(self, call: DispatchCall, sent: _Sent) -> None:
        row, route = (sent.local >= 0).nonzero().unbind(1)
        expert, place = sent.local[row, route], sent.place[row, route]
        # bytes: not every device has index_put for e4m3
        call.rows.view(torch.uint8)[expert, place] = sent.rows[row].view(torch.uint8)
        call.src_info[expert, place] = sent.token[row].int()
        if sent.scales is not None:
            assert call.scales is not None
            scales = sent.scales if call.shape.format != Format.FP8_UE8M0 else pack_ue8m0(sent.scales)
            call.scales[expert, place] = scales[row]
        local_experts, ranks = call.layout_range.shape
        counts = (expert * ranks + sent.source[row]).bincount(minlength=local_experts * ranks)
        counts = counts.view(local_experts, ranks)
        call.layout_range.copy_((counts.cumsum(1) - counts) << 32 | counts)
        call.counts.copy_(counts.sum(1))
        if call.stats is not None:
            call.stats += call.counts

    # -- combine -------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def combine(self, call: CombineCall, half: Half) -> None:
        self._refuse_capture()
        if half & Half.SEND:
            call.state = self._send_back(call)
            call.sent = True
        if half & Half.RECEIVE:
            call.out.copy_(call.state)

    def _send_back(self, call: CombineCall) -> Tensor:
        dispatched = call.dispatched
        sent: _Sent = dispatched.state
        dropped = call.topk_idx < 0
        with self._exchange.agreement("combine") as agreement:
            changed = (call.topk_idx != sent.experts) & ~dropped
            if bool(changed.any()):
                token, k = changed.nonzero()[0].tolist()
                expert = int(call.topk_idx[token, k])
                raise InputError("topk_idx", expert, f"route {k} of token {token} went elsewhere in the dispatch")
            agreement.facts = {"handle (the number of its dispatch)": sent.number, **self._facts(dispatched)}

        exchange = self._exchange.all_to_all
        with self._exchange.moving("combine"):
            weights = call.topk_weights[sent.tokens]
            kept = (~dropped)[sent.tokens].to(torch.uint8)
            weights = exchange("combine", weights, sent.send_counts, sent.recv_counts)
            kept = exchange("combine", kept, sent.send_counts, sent.recv_counts)
            sums = torch.zeros((len(sent.token), dispatched.shape.hidden), dtype=torch.float32, device=self.device)
            for k in range(sent.local.shape[1]):
                wanted = ((sent.local[:, k] >= 0) & (kept[:, k] > 0)).nonzero().squeeze(1)
                rows = call.x[sent.local[wanted, k], sent.place[wanted, k]].float()
                sums[wanted] += weights[wanted, k].unsqueeze(1) * rows
            back = exchange("combine", sums.bfloat16(), sent.recv_counts, sent.send_counts)
        total = torch.zeros((call.out.shape[0], dispatched.shape.hidden), dtype=torch.float32, device=self.device)
        first = 0
        for rank, count in enumerate(sent.send_counts):
            if not self._masked[rank]:
                total[sent.tokens[first : first + count]] += back[first : first + count].float()
            first += count
        return total.bfloat16()

    # -- refusals, masks -----------------------------------------------------------------------------------------

    def refuse_dispatch(self, max_tokens: object, hidden: int, problem: DeepEPMoEError) -> bool:
        return self._refuse("dispatch", problem)

    def refuse_combine(self, call: DispatchCall | None, problem: DeepEPMoEError) -> bool:
        return self._refuse("combine", problem)

    def _refuse(self, phase: Phase, problem: DeepEPMoEError) -> bool:
        with suppress(DeepEPMoEError), self._exchange.agreement(phase):  # the caller raises it
            raise problem
        return False  # the other ranks raise: no rank makes the call

    @torch.inference_mode()
    def update_mask(self, rank: int, masked: bool) -> None:
        self._masked[rank] = masked

    @torch.inference_mode()
    def query_mask(self, status: Tensor) -> None:
        status.copy_(self._masked)

    @torch.inference_mode()
    def clean_mask(self) -> None:
        self._masked.zero_()

    def check(self) -> None:
        pass

    def close(self) -> None:
        pass


def quantize(x: Tensor, format: Format) -> tuple[Tensor, Tensor | None]:
    """``x [T, H]`` as it is sent, and scales ``[T, H / 128]`` fp32: amax / 448, perhaps rounded to powers of two."""
    if format == Format.BF16:
        return x, None
    blocks = x.float().view(x.shape[0], x.shape[1] // BLOCK, BLOCK)
    amax = blocks.abs().amax(2).clamp(min=AMAX_FLOOR)
    # divided by a tensor: by a number PyTorch may multiply with a rounded reciprocal
    limit = torch.full_like(amax, E4M3_MAX)
    scales = amax / limit
    if format == Format.FP8:
        inverse = limit / amax
    else:
        mantissa, exponent = scales.frexp()  # mantissa in [0.5, 1)
        scales = torch.ldexp(torch.ones_like(scales), exponent - (mantissa == 0.5).int())
        inverse = scales.reciprocal()
    rows = (blocks * inverse.unsqueeze(2)).to(torch.float8_e4m3fn)
    return rows.view(x.shape), scales


def pack_ue8m0(scales: Tensor) -> Tensor:
    """Powers of two ``[N, S]`` fp32 -> their exponents, four in an int32, the first lowest; missing ones are 0."""
    exponents = (scales.view(torch.int32) >> 23) & 0xFF
    padding = -exponents.shape[1] % 4
    return torch.nn.functional.pad(exponents, (0, padding)).to(torch.uint8).view(torch.int32)
