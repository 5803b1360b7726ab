"""The low-latency engine with CUDA kernels over several nodes: NVLink inside a node, NVSHMEM puts to the others.

The kernels are those of one NVLink domain (low_latency_cuda.py). All memory that ranks share is in the symmetric heap
of NVSHMEM. Where these kernels address the memory of a rank of another node, they find staging memory of this GPU; an
*exchange* puts what is there into that rank's memory and waits for what the ranks of other nodes have put here. The
protocol is described in csrc/nvshmem/latency.h.

    dispatch   send, exchange, receive
    combine    send tables, exchange, send rows, exchange, receive

Ranks of other nodes are never addressed directly, even where NVSHMEM could map their memory.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from deepep_moe import nvshmem
from deepep_moe.backends import Backend
from deepep_moe.backends.exchange import gather
from deepep_moe.config import DispatcherConfig
from deepep_moe.domain import Domain
from deepep_moe.errors import UnsupportedError
from deepep_moe.extension import _C, MAX_LOW_LATENCY_RANKS, address, module_for, why_not_on
from deepep_moe.low_latency_cuda import CudaEngine, first_reason
from deepep_moe.low_latency_engine import CombineCall, DispatchCall, DispatchShape, Format, Half
from deepep_moe.topology import Nodes, find_nodes

# Upper bounds of what csrc/latency/args.h and csrc/nvshmem/latency.h lay out, for symmetric_bytes().
_ROUTES_BYTES, _WEIGHTS_BYTES = 11 * 16, 16 * 16  # of a token: packets of 32 routes
_COUNTS_BYTES = 1024 * 8
_ROW_SIGNALS_BYTES = 2 * 8  # of a token
_CONTROL_BYTES = 2 * (16 << 10)  # of a rank: control block and mailbox, and their staging memory
_SIGNAL_BYTES = 64 << 10


class _NodeMemory:
    """Symmetric memory, and staging memory of this rank for what it sends to ranks of other nodes.

    Args:
        peers: the group.
        nodes: its nodes.
        num_bytes: size on each rank.
        by_source: the memory consists of equal blocks, one for each source rank. Then staging memory has room for one
            block per rank of another node, and its address is displaced so that the block of this rank is there.

    Attributes:
        addresses: [R] the memory of each rank as mapped here, or staging memory.
        part: the range of the symmetric heap.
    """

    def __init__(self, peers: nvshmem.Peers, nodes: Nodes, num_bytes: int, by_source: bool) -> None:
        num_bytes = -(-num_bytes // nvshmem.PART_ALIGNMENT) * nvshmem.PART_ALIGNMENT if not by_source else num_bytes
        remote = _remote_ranks(nodes)
        block = num_bytes // len(peers.pes) if by_source else num_bytes
        most = len(peers.pes) - min(map(len, nodes.members))  # remote ranks of any rank: all take equally much
        self.part = peers.take(num_bytes + most * block)
        staging = self.part.address + num_bytes - (block * nodes.rank if by_source else 0)
        self.addresses = [
            staging + remote.index(rank) * block if rank in remote else _mapped(self.part.address, pe)
            for rank, pe in enumerate(peers.pes)
        ]


class NodesEngine(CudaEngine):
    """:class:`~deepep_moe.low_latency_engine.Engine` of a group on several nodes. Creating it is collective.

    Args:
        backend: the backend of the group.
        config: ``nvshmem_bytes``, ``timeout_seconds`` and ``ranks_per_node`` apply.
        num_sms: SMs that the kernels may use; 0: all.
        masks: mask a peer that does not answer in time, instead of raising an error.

    Raises:
        UnsupportedError: on every rank: a rank does not map the memory of another one of its node.
        CapacityError: on every rank: the symmetric heap is too small.
    """

    name = "nodes"

    def __init__(self, backend: Backend, config: DispatcherConfig, num_sms: int, masks: bool) -> None:
        group, device = backend.group, backend.device
        self._peers = peers = nvshmem.initialize(group, device, config)
        self._nodes = nodes = find_nodes(group, device, config)
        self._memories: list[_NodeMemory] = []
        self._told_at: set[Half] = set()  # launches of the running call before which something had been reported
        self._packed: dict[tuple[int, int], bytes] = {}
        module = module_for(nvshmem.module(), backend.world_size)
        signals = peers.take(module.LATENCY_SIGNAL_BYTES)
        _check_mapped(signals.address, peers, nodes)

        def allocate(num_bytes: int, by_source: bool) -> _NodeMemory:
            memory = _NodeMemory(peers, nodes, num_bytes, by_source)
            if by_source:
                self._memories.append(memory)
            return memory

        super().__init__(Domain(group, device, config.timeout_seconds, config.debug_waits, allocate), num_sms, masks)
        self._posted = torch.zeros(module.LATENCY_POSTED_BYTES, dtype=torch.uint8, device=device)
        torch.cuda.synchronize(device)
        self._remote = module.LatencyRemote(
            runtime=self._engine.pack_runtime(),
            pes=list(peers.pes),
            ranks=_remote_ranks(nodes),
            signals=signals.address,
            posted=self._posted.data_ptr(),
        )

    @staticmethod
    def why_not(backend: Backend, config: DispatcherConfig) -> str | None:
        """The reason this engine does not serve the group of ``backend``, or None; equal on all ranks. Collective."""
        device, ranks = backend.device, backend.world_size
        reason = why_not_on(device) or nvshmem.why_not_on(device)
        if reason is None and ranks > MAX_LOW_LATENCY_RANKS:
            reason = f"the group has {ranks} ranks, low-latency kernels serve up to {MAX_LOW_LATENCY_RANKS}"
        return first_reason(backend, reason)

    # -- calls ---------------------------------------------------------------------------------------------------
    # Here a call is several launches. What the first of them reports may be known to the host at the last, but the
    # next call raises it, as on one node: only this rank may know of it, and the others go on with their next call.

    def dispatch(self, call: DispatchCall, half: Half) -> None:
        self._told_at.clear()
        if half & Half.SEND:
            super().dispatch(call, Half.SEND)
        step = self._step.DISPATCH
        self._exchange(step, half, call.shape, call.memory, call.memory, call.topk_idx, call.wait_stats)
        if half & Half.RECEIVE:
            super().dispatch(call, Half.RECEIVE)
            self._end(half, Half.SEND)

    def combine(self, call: CombineCall, half: Half) -> None:
        shape, places = call.dispatched.shape, call.dispatched.memory
        self._told_at.clear()
        if half & Half.SEND:
            call.state = torch.empty((1,), dtype=torch.int32, device=self.device)
            super().combine(call, Half.TABLES)
            self._exchange(self._step.TABLES, Half.BOTH, shape, places, call.state, call.topk_idx, call.wait_stats)
            super().combine(call, Half.ROWS)
        self._exchange(self._step.ROWS, half, shape, places, call.state, call.topk_idx, call.wait_stats)
        if half & Half.RECEIVE:
            super().combine(call, Half.RECEIVE)
            self._end(half, Half.TABLES)

    @property
    def _step(self) -> Any:
        return nvshmem.module().LatencyStep

    def _exchange(
        self,
        step: Any,
        half: Half,
        shape: DispatchShape,
        places: Tensor,
        epoch: Tensor,
        topk_idx: Tensor,
        wait_stats: Tensor | None,
    ) -> None:
        """Put what was sent, if ``half`` sends, and wait for what other nodes have sent, if it receives."""
        self._remote.exchange(
            arena=self._packed[shape.max_tokens, shape.hidden],
            step=step,
            puts=bool(half & Half.SEND),
            waits=bool(half & Half.RECEIVE),
            refuses=False,
            num_tokens=shape.tokens,
            topk_idx=topk_idx.data_ptr(),
            wide_idx=topk_idx.dtype == torch.int64,
            num_topk=shape.topk,
            num_experts=shape.num_experts,
            format=shape.format,
            places=places.data_ptr(),
            epoch=epoch.data_ptr(),
            wait_stats=address(wait_stats),
            stream=self._domain.enter_stream(),
        )

    def _await_refused(self, step: Any, epoch: Tensor) -> None:
        """Wait for what other nodes have sent in a call that this rank refused, in whichever arena."""
        for arena in self._packed.values():
            self._remote.exchange(
                arena=arena,
                step=step,
                puts=False,
                waits=True,
                refuses=True,
                num_tokens=0,
                topk_idx=0,
                wide_idx=False,
                num_topk=0,
                num_experts=0,
                format=Format.BF16,
                places=0,
                epoch=epoch.data_ptr(),
                wait_stats=0,
                stream=self._domain.enter_stream(),
            )

    def _end(self, half: Half, first: Half) -> None:
        """After the last launch of a call: raise what had been reported before its first launch.

        Args:
            half: the half of the call.
            first: its first launch, if it is a call without a hook.
        """
        if half is Half.RECEIVE:  # after a call without a hook the next exchange confirms it in time
            self._post()
            first = Half.RECEIVE
        if first in self._told_at:
            self.check()

    def _post(self) -> None:
        self._remote.post(self._domain.enter_stream())

    def _tell(self, told: int, call: DispatchCall | CombineCall, half: Half) -> None:
        if told == _C.LATENCY_BROKEN:
            self._spread_failure()
            self._domain.raise_lasting()
        self._told_at.add(half)

    def _spread_failure(self) -> None:
        """Tell ranks of other nodes of a permanent failure: kernels could tell only the ranks of this node."""
        nvshmem.do_not_finalize()
        if not torch.cuda.is_current_stream_capturing():
            self._post()

    def check(self) -> None:
        if not self._domain.usable:
            self._spread_failure()
        super().check()

    def _refuse(self, kind: _C.LatencyKind, passed_on: Tensor | None, source: Tensor | None) -> None:
        epoch = torch.zeros((1,), dtype=torch.int32, device=self.device)
        self._remote.refuse(kind.value, address(source), epoch.data_ptr(), self._domain.enter_stream())
        # For a combine there are no rows: the others have no weights of this rank.
        self._await_refused(self._step.DISPATCH if kind == _C.LatencyKind.DISPATCH else self._step.TABLES, epoch)
        super()._refuse(kind, passed_on, source)
        self._post()

    def _announce_refusal(self, others: Tensor) -> None:
        self._remote.announce_refusal(others.data_ptr(), self._domain.enter_stream())

    def _announce(
        self, max_tokens: int, hidden: int, topk: int, num_experts: int, format: Format, withdrawn: bool = False
    ) -> None:
        super()._announce(max_tokens, hidden, topk, num_experts, format, withdrawn)
        self._remote.announce(withdrawn, self._domain.enter_stream())

    # -- memory, masks and the end -------------------------------------------------------------------------------

    def _make_arena(self, shape: DispatchShape) -> Any:
        arena = super()._make_arena(shape)
        self._packed[shape.max_tokens, shape.hidden] = arena.view.pack()
        return arena

    def _lift_masks(self, ranks: list[int]) -> None:
        stream = self._domain.enter_stream()
        self._remote.meet(False, ranks, stream)
        self._engine.clear_rows(stream)
        self._remote.meet(True, [], stream)
        self._remote.post(stream)

    def close(self) -> None:
        super().close()
        self._packed.clear()
        # After a failure puts may be pending, so the memory is not used again. Control blocks, mailboxes and signals
        # never are: the last confirmations of peers may arrive late.
        if self._domain.usable:
            for memory in self._memories:
                memory.part.free()
        else:
            nvshmem.do_not_finalize()
        self._memories.clear()

    def __del__(self) -> None:
        if getattr(self, "_memories", None) and self._domain.usable:
            nvshmem.release([memory.part for memory in self._memories], [self._posted])


def symmetric_bytes(max_tokens: int, hidden: int, ranks: int) -> int:
    """Symmetric memory per GPU for calls with at most ``max_tokens`` tokens of each rank: an upper bound."""
    tables = max_tokens * (_ROUTES_BYTES + _WEIGHTS_BYTES + _ROW_SIGNALS_BYTES) + _COUNTS_BYTES
    block = tables + 2 * max_tokens * 2 * hidden + 1024  # rows of dispatch and combine; padding
    arena_and_staging = 2 * 2 * ranks * block  # both halves of every rank's block
    return arena_and_staging + ranks * _CONTROL_BYTES + _SIGNAL_BYTES


def _remote_ranks(nodes: Nodes) -> list[int]:
    return [rank for rank, node in enumerate(nodes.node_of) if node != nodes.node]


def _mapped(own: int, pe: int) -> int:
    mapped: int = nvshmem.module().mapped_address(own, pe)
    return mapped


def _check_mapped(own: int, peers: nvshmem.Peers, nodes: Nodes) -> None:
    """Raise UnsupportedError on every rank unless the ranks of each node map each other's memory. Collective."""
    unmapped = [rank for rank in nodes.members[nodes.node] if not _mapped(own, peers.pes[rank])]
    told = gather("set-up", peers.group, peers.device, peers.timeout_seconds, unmapped)
    missing = [f"rank {rank} does not map {', '.join(map(str, those))}" for rank, those in enumerate(told) if those]
    if missing:
        raise UnsupportedError(
            "low-latency calls over several nodes need the memory of all GPUs of a node mapped by NVSHMEM: "
            f"{'; '.join(missing)} of its node. nvidia-smi topo -p2p r shows peer access; unset NVSHMEM_DISABLE_P2P"
        )
