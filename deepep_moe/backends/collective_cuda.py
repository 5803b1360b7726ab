"""The collective backend on GPUs: the CUDA extension's kernels do the local work, NCCL carries packed rows.

* :meth:`CollectiveOnGPU.plan` counts the batch in one kernel, sends one message to each rank (the header of
  headers.py, counts, and the expert indices of each row that the rank gets) and waits on the host for the messages of
  the others. That is its only wait. Then one kernel places every row. Messages have a fixed size; if a batch needs more
  room, all ranks see that in the counts and exchange larger messages from then on.
* :meth:`CollectiveOnGPU.dispatch` packs each token for each rank that wants it (quantised, if asked), sends the packed
  rows in one all-to-all, and expands what arrives into the layout asked for.
* :meth:`CollectiveOnGPU.combine` sums a token's expert rows into one packed row, sends it home in one all-to-all, and
  sums the ranks' rows there.

Results are those of :class:`~deepep_moe.backends.collective.CollectiveBackend`, bit for bit, except where combine
multiplies weights into rows: there a product is not rounded before it is added.

If one rank has bad input, it raises its own error and the others a ``PeerError``. In a plan all ranks raise within the
call and may go on. In dispatch and combine the host does not wait for the peers: they raise within their next call, the
results of the failed call are NaN, and the group is given up. Ranks in different calls get a ``RankMismatchError`` in
the same way.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import NamedTuple, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor

from deepep_moe import extension
from deepep_moe.backends.announcements import Announced, Announcements
from deepep_moe.backends.base import Destinations, Layout, Phase, Plan, Rows, Tokens, Wire
from deepep_moe.backends.checks import check_limits, check_plan_inputs, check_topk_idx, overflow_text
from deepep_moe.backends.collective import CollectiveBackend
from deepep_moe.backends.exchange import Agreement, Exchange, Room, Transfer, gather
from deepep_moe.backends.headers import HEADER_WORDS, Fact, reason_of, refused_by
from deepep_moe.backends.local import RowFormat, Segments, expand_rows, pack_rows, sum_packed_rows, sum_rows
from deepep_moe.backends.tensor_plan import TensorPlan
from deepep_moe.config import DispatcherConfig
from deepep_moe.errors import CapacityError, DeepEPMoEError, InputError, PeerError, UnsupportedError

_FIRST_COUNT = HEADER_WORDS + 4  # after the lowest and highest expert index of the sender's batch, and its two limits
_NO_LIMIT = 2**31 - 1


class Crossing(NamedTuple):
    """How many rows of a batch go where, as the host knows it."""

    sent: list[int]  # to each rank, 0 for this one
    received: list[int]  # from each rank, 0 for this one
    segments: Segments  # the rows that stay on this rank

    @classmethod
    def of(cls, counts: Tensor, rank: int) -> Crossing:
        """``counts [R, R]`` on the CPU: entry [s, d] says how many rows rank s sends to rank d."""
        sent, received = counts[rank].tolist(), counts[:, rank].tolist()
        segments = Segments(sum(received[:rank]), sent[rank])
        sent[rank] = received[rank] = 0
        return cls(sent, received, segments)

    @property
    def num_sent(self) -> int:
        """Rows sent to other ranks."""
        return sum(self.sent)

    @property
    def num_arriving(self) -> int:
        """Rows that come from other ranks."""
        return sum(self.received)

    @property
    def num_received(self) -> int:
        """Rows that come from all ranks, this one included."""
        return self.num_arriving + self.segments.num_own

    @property
    def num_rows(self) -> int:
        """Rows of a buffer that holds all of them (:class:`Segments`), whichever way they go."""
        return self.num_sent + self.num_received

    def back(self) -> Crossing:
        """The way back of the same rows."""
        return Crossing(self.received, self.sent, self.segments)


@dataclass(eq=False)
class _HostPlan(TensorPlan):
    """A plan whose counts the host still knows, so that moving rows needs no wait."""

    crossing: Crossing | None = None
    starts: Tensor | None = None
    """[2, R] int32: first packed row for each rank on the way there, and from each rank on the way back."""


class CollectiveOnGPU(CollectiveBackend):
    """:class:`CollectiveBackend` with kernels for what happens on one rank; see :func:`make_collective`."""

    def __init__(self, group: dist.ProcessGroup, device: torch.device, config: DispatcherConfig) -> None:
        super().__init__(group, device, config)
        self._announcements = Announcements(self._open(), config.check_agreement)

    # -- planning ------------------------------------------------------------------------------------------------

    def destinations(self, topk_idx: Tensor, num_experts: int) -> Destinations:
        check_topk_idx(topk_idx, num_experts, self.world_size, self.device)
        ranks, room, limits = self.world_size, Room(num_experts, row_words=0), (None, None)
        messages, send_slot = self._count([0] * HEADER_WORDS, topk_idx, num_experts, None, None, limits, room)
        counts = messages[0, _FIRST_COUNT:].to(torch.int32)
        return Destinations(
            num_tokens_per_rank=counts[:ranks],
            num_tokens_per_node=None,
            num_tokens_per_expert=counts[ranks:],
            is_token_in_rank=send_slot >= 0,
        )

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
        exchange = self._enter("plan")
        exchange.count_plan()
        fixed = max_recv is not None or max_rows is not None
        try:
            check_plan_inputs(
                topk_idx, num_experts, alignment, is_token_in_rank, num_tokens_per_expert, self.world_size, self.device
            )
            check_limits(max_recv, max_rows)
        except Exception as error:
            self._refuse_plan(error)
        if topk_idx is not None:
            topk_idx = topk_idx.to(torch.int64).contiguous()
            is_token_in_rank = num_tokens_per_expert = None
        else:
            assert is_token_in_rank is not None
            shape = (is_token_in_rank.shape[0], 0)
            topk_idx = torch.empty(shape, dtype=torch.int64, device=self.device)
        facts: dict[str, Fact] = {
            "num_experts": num_experts,
            "top-k": topk_idx.shape[1],
            "expert alignment": alignment,
            **self._settings,
            "fixed sizes": fixed,
        }
        header = exchange.header("plan", facts)
        ranks, local_experts, limits = self.world_size, num_experts // self.world_size, (max_recv, max_rows)
        while True:
            room = exchange.room
            with exchange.moving("plan"):
                sent, send_slot = self._count(
                    header, topk_idx, num_experts, is_token_in_rank, num_tokens_per_expert, limits, room
                )
                starts = self._starts(sent, room)
                with self._announcements.waiting("plan", facts, header):
                    messages = self._swap(sent)
                    counts = messages[:, : _FIRST_COUNT + ranks + room.expert_words].contiguous()
                    host = exchange.read("plan", counts)
            self._check_messages(facts, host, num_experts)
            counts = host[:, _FIRST_COUNT:]
            row_words = -(-int(counts[:, :ranks].max()) * (1 + topk_idx.shape[1]) // 2)
            if num_experts <= room.expert_words and row_words <= room.row_words:
                break
            # The same on all ranks. Loads vary from batch to batch, hence the margin.
            exchange.room = Room(max(room.expert_words, num_experts), max(room.row_words, row_words + row_words // 4))
        crossing = Crossing.of(counts[:, :ranks], self.rank)
        has_rows = topk_idx.shape[1] > 0
        if fixed:  # only sizes that were fixed beforehand can be too small
            per_expert = counts[:, ranks : ranks + num_experts].sum(0).view(ranks, local_experts)
            rows = (per_expert + alignment - 1).div(alignment, rounding_mode="floor").sum(1) * (alignment * has_rows)
            self._raise_overflow(host, counts[:, :ranks].sum(0), rows)
        first = ranks + self.rank * local_experts
        per_expert = counts[:, first : first + local_experts].sum(0)
        num_recv = crossing.num_received if max_recv is None else max_recv
        if max_rows is None:
            max_rows = sum(-(-count // alignment) * alignment for count in per_expert.tolist())
        num_rows = max_rows if has_rows else 0
        with exchange.moving("plan"):
            counted, received, row_recv = self._place_rows(
                messages, room, topk_idx.shape[1], local_experts, alignment, crossing.num_received, num_recv, num_rows
            )
        return _HostPlan(
            num_experts=num_experts,
            alignment=alignment,
            identity=(self.number, exchange.plans),
            topk_idx=topk_idx,
            send_slot=send_slot,
            counted=counted,
            received=received,
            row_recv=row_recv,
            expert_counts_host=None if fixed else per_expert,
            crossing=crossing,
            starts=starts,
        )

    def _count(
        self,
        header: list[int],
        topk_idx: Tensor,
        num_experts: int,
        is_token_in_rank: Tensor | None,
        num_tokens_per_expert: Tensor | None,
        limits: tuple[int | None, int | None],
        room: Room,
    ) -> tuple[Tensor, Tensor]:
        """A message for each rank, [R, words] int64, and ``Plan.send_slot``. What ``room`` does not suffice for is left
        out of the messages. ``limits``: ``max_recv`` and ``max_rows`` of the plan."""
        topk_idx = topk_idx.to(torch.int64).contiguous()
        is_token_in_rank, num_tokens_per_expert = (
            None if t is None else t.contiguous() for t in (is_token_in_rank, num_tokens_per_expert)
        )
        (tokens, topk), ranks = topk_idx.shape, self.world_size
        max_recv, max_rows = (_NO_LIMIT if limit is None else limit for limit in limits)
        messages = torch.empty((ranks, self._message_words(room)), dtype=torch.int64, device=self.device)
        send_slot = torch.empty((tokens, ranks), dtype=torch.int32, device=self.device)
        extension._C.count(
            topk_idx=topk_idx.data_ptr(),
            given_membership=extension.address(is_token_in_rank),
            given_expert_counts=extension.address(num_tokens_per_expert),
            num_tokens=tokens,
            num_topk=topk,
            num_experts=num_experts,
            max_recv=max_recv,
            max_rows=max_rows,
            header=header,
            messages=self._messages(messages, room),
            send_slot=send_slot.data_ptr(),
            stream=extension.current_stream(self.device),
        )
        return messages, send_slot

    def _swap(self, messages: Tensor) -> Tensor:
        """The messages of all ranks to this one, [R, words]."""
        ones, arrived = [1] * self.world_size, torch.empty_like(messages)
        in_bytes = Transfer(messages.view(torch.uint8), ones, ones, arrived.view(torch.uint8))
        self._open().transfer("plan", [in_bytes])
        return arrived

    def _starts(self, messages: Tensor, room: Room) -> Tensor:
        """``_HostPlan.starts``, from the messages that this rank sends."""
        starts = torch.empty((2, self.world_size), dtype=torch.int32, device=self.device)
        extension._C.starts(
            messages=self._messages(messages, room),
            rank=self.rank,
            starts=starts.data_ptr(),
            stream=extension.current_stream(self.device),
        )
        return starts

    def _check_messages(self, facts: dict[str, Fact], host: Tensor, num_experts: int) -> None:
        """Raise what is wrong with the batch of any rank, and what went wrong in calls before this one."""
        exchange = self._open()
        self._announcements.check()
        exchange.check_usable("plan")
        exchange.compare_headers("plan", facts, host, None)
        ranges = host[:, HEADER_WORDS : HEADER_WORDS + 2].tolist()
        wrong = {
            rank: InputError(
                "topk_idx",
                lowest if lowest < -1 else highest,
                f"an expert must be -1 (dropped) or 0 to {num_experts - 1}",
            )
            for rank, (lowest, highest) in enumerate(ranges)
            if lowest < -1 or highest >= num_experts
        }
        self._raise(wrong)

    def _raise_overflow(self, host: Tensor, received: Tensor, rows: Tensor) -> None:
        """Raise an error if any rank has too little room for ``received [R]`` tokens or ``rows [R]`` expert rows."""
        limits = host[:, _FIRST_COUNT - 2 : _FIRST_COUNT]
        wrong = {}
        for rank in (torch.stack([received, rows], dim=1) > limits).any(1).nonzero()[:, 0].tolist():
            needed, room, what = int(received[rank]), int(limits[rank, 0]), ("received tokens", "max_recv")
            if needed <= room:
                needed, room, what = int(rows[rank]), int(limits[rank, 1]), ("expert rows", "max_rows")
            text = overflow_text(self.config, rank, needed, *what, room)
            wrong[rank] = CapacityError(text, needed=needed, room=room)
        self._raise(wrong)

    def _raise(self, wrong: Mapping[int, DeepEPMoEError]) -> None:
        """Raise the error of this rank, or what the other ranks are told of theirs."""
        if self.rank in wrong:
            raise wrong[self.rank]
        if wrong:
            raise refused_by({rank: reason_of(error) for rank, error in wrong.items()}, "plan")

    def _place_rows(
        self,
        messages: Tensor,
        room: Room,
        topk: int,
        local_experts: int,
        alignment: int,
        num_received: int,
        num_recv: int,
        num_rows: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """``Plan.counted``, ``.received`` and ``.row_recv``. ``num_received`` rows arrive, of ``num_recv`` at most."""
        ranks = self.world_size
        counted = torch.empty(ranks * ranks + 2 * local_experts + 1, dtype=torch.int64, device=self.device)
        received = torch.empty((num_recv, 1 + 2 * topk), dtype=torch.int32, device=self.device)
        row_recv = torch.empty(num_rows, dtype=torch.int32, device=self.device)
        extension._C.place(
            messages=self._messages(messages, room),
            num_received=num_received,
            max_recv=num_recv,
            max_rows=num_rows,
            num_topk=topk,
            local_experts=local_experts,
            alignment=alignment,
            rank=self.rank,
            counted=counted.data_ptr(),
            received=received.data_ptr(),
            row_recv=row_recv.data_ptr(),
            stream=extension.current_stream(self.device),
        )
        return counted, received, row_recv

    def refuse(self, phase: Phase, error: Exception) -> NoReturn:
        exchange = self._open()
        try:
            if phase != "plan":
                with self._agreement(phase):
                    raise error
            exchange.check_usable("plan")
            exchange.count_plan()
            self._refuse_plan(error)
        finally:
            del error  # its traceback holds this frame: together they would keep the caller's tensors alive

    def _refuse_plan(self, error: Exception) -> NoReturn:
        """Take this rank's place in the exchange of messages, marked."""
        exchange = self._open()
        try:
            if self.world_size > 1:
                shape = (self.world_size, self._message_words(exchange.room))
                message = torch.zeros(shape, dtype=torch.int64, device=self.device)
                header = exchange.header("plan", {}, refused=True)
                message[:, :HEADER_WORDS] = torch.tensor(header, dtype=torch.int64, device="cpu").to(self.device)
                with suppress(PeerError), self._announcements.waiting("plan", {}, header):  # it has its own reason
                    host = exchange.to_host("plan", self._swap(message)[:, :HEADER_WORDS].contiguous())
                    exchange.compare_headers("plan", {}, host, error)
            raise error
        finally:
            del error

    # -- moving rows ---------------------------------------------------------------------------------------------

    def _dispatch(
        self,
        plan: Plan,
        x: Tensor,
        layout: Layout,
        wire: Wire,
        scales: Tensor | None,
        weights: Tensor | None,
        into: Rows | None,
        agreement: Agreement,
    ) -> Rows:
        crossing, starts = self._crossing("dispatch", plan)
        call = self._announcements.begin("dispatch", agreement.facts)
        x = x.detach()
        format = RowFormat.of(x, scales, weights, quantize=wire is not Wire.AS_GIVEN)
        packed = self._buffer(crossing, format)
        pack_rows(x, plan.send_slot, packed, format, starts=starts[0], scales=scales, weights=weights)
        arrived = self._exchange_rows(call, packed, crossing)
        by_expert = layout is Layout.BY_EXPERT
        rows = expand_rows(
            arrived,
            format,
            crossing.num_received,
            plan.num_rows if by_expert else plan.num_recv,
            layout=layout,
            places=plan.recv_rows,
            row_recv=plan.row_recv if by_expert else None,
            segments=crossing.segments,
            dequantize=wire is Wire.E4M3_TO_BF16,
            into=into,
            headers=call.headers,
        )
        if weights is not None and rows.weights is None:  # without expert indices there are none
            rows = rows._replace(weights=weights.new_empty((plan.num_recv, 0)))
        return rows

    def _combine(
        self,
        plan: Plan,
        x: Tensor,
        layout: Layout,
        weights: Tensor | None,
        apply_weights: bool,
        bias: tuple[Tensor, ...],
        agreement: Agreement,
    ) -> Tokens:
        crossing, starts = self._crossing("combine", plan)
        back = crossing.back()
        call = self._announcements.begin("combine", agreement.facts)
        x, bias = x.detach(), tuple(added.detach() for added in bias)
        carried = 0 if weights is None or apply_weights else plan.num_topk
        format = RowFormat(x.dtype, x.shape[1], num_weights=carried)
        packed = self._buffer(back, format)
        by_expert = layout is Layout.BY_EXPERT
        sum_rows(
            x,
            plan.recv_rows if by_expert else None,
            packed,
            format,
            crossing.num_received,
            segments=back.segments,
            row_weights=weights if by_expert else None,
            apply_weights=apply_weights,
            vectors=None if by_expert or not carried else weights,
        )
        arrived = self._exchange_rows(call, packed, back)
        tokens, summed = sum_packed_rows(
            arrived,
            plan.send_slot,
            format,
            starts=starts[1],
            most=plan.num_topk or None,
            bias=bias,
            headers=call.headers,
        )
        if weights is not None and not apply_weights and summed is None:
            summed = weights.new_empty((plan.num_tokens, 0))
        return Tokens(tokens, summed)

    def _buffer(self, crossing: Crossing, format: RowFormat) -> Tensor:
        """Packed rows of a crossing, both sent and received: :class:`Segments` says in which order."""
        return torch.empty((crossing.num_rows, format.pitch), dtype=torch.uint8, device=self.device)

    def _exchange_rows(self, call: Announced, rows: Tensor, crossing: Crossing) -> Tensor:
        """Send the first ``num_sent`` of ``rows``, receive the last; returns all received ones, own rows first."""
        received = rows[crossing.num_sent :]
        if self.world_size > 1:
            sent, out = rows[: crossing.num_sent], received[crossing.segments.num_own :]
            self._announcements.move(call, Transfer(sent, crossing.sent, crossing.received, out))
        return received

    def _crossing(self, phase: Phase, plan: Plan) -> tuple[Crossing, Tensor]:
        if isinstance(plan, _HostPlan) and plan.crossing is not None and plan.starts is not None:
            if plan.starts.is_cuda:  # callers cannot record it: it is not among the plan's tensors
                plan.starts.record_stream(torch.cuda.current_stream(self.device))
            return plan.crossing, plan.starts
        # A plan that went through operators is made of tensors alone: this waits for the device.
        prefix = self._open().to_host(phase, plan.rank_prefix)
        counts = prefix.diff(dim=0, prepend=prefix.new_zeros((1, self.world_size)))
        crossing = Crossing.of(counts, self.rank)
        sent, own = torch.tensor(crossing.sent, dtype=torch.int32, device="cpu"), crossing.segments.num_own
        there = sent.cumsum(0, dtype=torch.int32) - sent
        starts = torch.stack([there, there + own])
        starts[0, self.rank], starts[1, self.rank] = crossing.num_sent, 0
        return crossing, starts.to(self.device)

    # -- checks --------------------------------------------------------------------------------------------------

    def barrier(self) -> None:
        with self._announcements.waiting("barrier", {}, self._open().header("barrier", {})):
            super().barrier()

    def check(self) -> None:
        exchange = self._open()
        self._announcements.check()
        exchange.check_usable("check")

    @contextmanager
    def _agreement(self, phase: Phase) -> Iterator[Agreement]:
        """This rank's input, checked by the body, for a call whose agreement nothing waits for."""
        self._enter(phase)
        mine = Agreement()
        try:
            yield mine
        except Exception as error:
            self._announcements.refuse(phase, f"{type(error).__name__}: {error}")
            raise

    def _enter(self, phase: Phase) -> Exchange:
        """Raise what forbids a call on this rank, without taking part in it."""
        exchange = self._open()
        exchange.check_usable(phase)
        if extension.is_capturing(self.device):
            raise UnsupportedError(
                "the collective backend cannot be captured in a CUDA graph: the host reads the counts of each plan. "
                "Backend nvlink with capacity_factor can"
            )
        return exchange

    def _message_words(self, room: Room) -> int:
        return _FIRST_COUNT + self.world_size + sum(room)

    def _messages(self, messages: Tensor, room: Room) -> extension._C.Messages:
        return extension._C.Messages(messages.data_ptr(), self.world_size, *room)


def make_collective(group: dist.ProcessGroup, device: torch.device, config: DispatcherConfig) -> CollectiveBackend:
    """The collective backend of ``group``: with kernels where they serve the GPU of every rank. Collective on a GPU."""
    if device.type != "cuda":
        return CollectiveBackend(group, device, config)
    reasons = gather("set-up", group, device, config.timeout_seconds, extension.why_not_on(device))
    return (CollectiveBackend if any(reasons) else CollectiveOnGPU)(group, device, config)
