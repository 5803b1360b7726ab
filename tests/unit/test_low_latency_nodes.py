"""Where the kernels of one rank find the memory of others, over several nodes."""

from __future__ import annotations

from contextlib import nullcontext
from itertools import pairwise
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from deepep_moe import DispatcherConfig, low_latency_cuda, nvshmem
from deepep_moe import low_latency_nodes as nodes_module
from deepep_moe.errors import InputError, PeerTimeoutError, UnsupportedError
from deepep_moe.low_latency_engine import Half
from deepep_moe.topology import Nodes

HEAP, MAPPED = 1 << 30, 1 << 40  # address of this rank's memory, and of that of PE 0 as mapped here
MEMBERS = ((0, 2), (1, 3, 4), (5,))  # not equally many
PES = (7, 6, 5, 4, 3, 2)


def make(monkeypatch: pytest.MonkeyPatch, rank: int, num_bytes: int, by_source: bool) -> tuple[Any, int]:
    """The memory of ``rank``, and how many bytes of the symmetric heap it took."""
    taken: list[int] = []

    class Peers:
        pes = PES

        def take(self, num_bytes: int) -> SimpleNamespace:
            taken.append(num_bytes)
            return SimpleNamespace(address=HEAP)

    module = SimpleNamespace(mapped_address=lambda own, pe: own if pe == PES[rank] else MAPPED * (1 + pe))
    monkeypatch.setattr(nvshmem, "module", lambda: module)
    nodes = Nodes(MEMBERS, rank, ("a", "b", "c"))
    peers: Any = Peers()
    memory = nodes_module._NodeMemory(peers, nodes, num_bytes, by_source)
    return memory, taken[0]


@pytest.mark.parametrize("rank", range(6))
@pytest.mark.parametrize("by_source", [False, True])
def test_ranks_of_other_nodes_have_staging_memory_of_their_own(
    monkeypatch: pytest.MonkeyPatch, rank: int, by_source: bool
) -> None:
    block = 128 * 3
    num_bytes = 6 * block if by_source else 1000
    memory, taken = make(monkeypatch, rank, num_bytes, by_source)
    node = next(ranks for ranks in MEMBERS if rank in ranks)
    used: list[tuple[int, int]] = [(HEAP, HEAP + num_bytes)]
    for other, address in enumerate(memory.addresses):
        if other == rank:
            assert address == HEAP
        elif other in node:
            assert address == MAPPED * (1 + PES[other])
        else:  # by source, kernels only store into the block of their own rank
            first = address + block * rank if by_source else address
            used.append((first, first + (block if by_source else num_bytes)))
    assert len(used) == 7 - len(node)
    assert taken == (num_bytes if by_source else 1024) + 5 * (block if by_source else 1024), "the same on all ranks"
    used.sort()
    assert all(end <= begin for (_, end), (begin, _) in pairwise(used)), "staging memory overlaps"
    assert used[0][0] == HEAP and used[-1][1] <= HEAP + taken
    assert all(first % 16 == 0 for first, _ in used)


def test_unmapped_memory_inside_a_node_is_named_on_all_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    module = SimpleNamespace(mapped_address=lambda own, pe: 0 if pe == PES[3] else own)
    monkeypatch.setattr(nvshmem, "module", lambda: module)
    peers: Any = SimpleNamespace(pes=PES, group=None, device=None, timeout_seconds=1.0)
    told = [[] if rank != 1 else [3] for rank in range(6)]
    for rank, ranks in ((1, [3]), (0, []), (5, [])):

        def gather(*arguments: Any, own: list[int] = ranks) -> list[list[int]]:
            assert arguments[-1] == own
            return told

        monkeypatch.setattr(nodes_module, "gather", gather)
        with pytest.raises(UnsupportedError, match=r"rank 1 does not map 3 of its node.*NVSHMEM_DISABLE_P2P"):
            nodes_module._check_mapped(HEAP, peers, Nodes(MEMBERS, rank, ("a", "b", "c")))


def test_the_size_hint_covers_the_largest_tables() -> None:
    tokens, hidden, ranks = 128, 7168, 16
    block = tokens * (11 * 16 + 16 * 16) + 1024 * 8 + 2 * tokens * 2 * hidden
    hint = nodes_module.symmetric_bytes(tokens, hidden, ranks)
    assert 2 * block * (2 * ranks - 1) < hint < 1.1 * 2 * block * 2 * ranks


def test_a_rank_that_kernels_cannot_serve_is_named_on_every_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nodes_module, "why_not_on", lambda device: None)
    monkeypatch.setattr(nvshmem, "why_not_on", lambda device: None)

    def reason(ranks: int, of_rank_1: str | None = None) -> str | None:
        monkeypatch.setattr(low_latency_cuda, "gather", lambda *arguments: [arguments[-1], of_rank_1])
        backend: Any = SimpleNamespace(
            device=torch.device("cuda"), group=None, world_size=ranks, config=DispatcherConfig()
        )
        return nodes_module.NodesEngine.why_not(backend, DispatcherConfig(rail="nvshmem"))

    assert reason(128) is None
    assert reason(33, "no NVSHMEM") == "rank 1: no NVSHMEM"
    assert reason(129) == "rank 0: the group has 129 ranks, low-latency kernels serve up to 128"


@pytest.mark.parametrize("usable", [True, False])
def test_a_permanent_failure_is_told_to_other_nodes(monkeypatch: pytest.MonkeyPatch, usable: bool) -> None:
    """By the check that raises it, however it was found. NVSHMEM's end, which is collective, is then left out."""
    done: list[str] = []
    monkeypatch.setattr(nvshmem, "do_not_finalize", lambda: done.append("no end"))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)

    def raise_failure() -> None:
        if not usable:
            raise PeerTimeoutError("rank 1 did not come")

    engine = object.__new__(nodes_module.NodesEngine)
    engine._domain = cast(
        Any,
        SimpleNamespace(usable=usable, raise_failure=raise_failure, raise_notice=lambda: None, enter_stream=lambda: 0),
    )
    engine._remote = SimpleNamespace(post=lambda stream: done.append("told"))
    with nullcontext() if usable else pytest.raises(PeerTimeoutError, match="rank 1 did not come"):
        engine.check()
    assert done == ([] if usable else ["no end", "told"])


BROKEN = 2
_LAUNCHES = {
    "dispatch": ["send", "exchange", "receive"],
    "combine": ["tables", "exchange", "rows", "exchange", "receive"],
}


@pytest.mark.parametrize("kind", ["dispatch", "combine"])
@pytest.mark.parametrize(
    ("half", "told", "raised"),
    [
        (Half.BOTH, [], False),
        (Half.BOTH, ["receive"], False),  # its own kernels reported it: the next call raises it
        (Half.BOTH, ["rows", "receive"], False),
        (Half.BOTH, ["send", "tables", "rows", "receive"], True),  # an earlier call did
        (Half.SEND, ["send", "tables", "rows"], False),  # its hook raises it
        (Half.RECEIVE, ["receive"], True),
        (Half.RECEIVE, [], False),
    ],
)
def test_a_call_is_launched_as_a_whole_before_it_raises_what_an_earlier_call_reported(
    monkeypatch: pytest.MonkeyPatch, kind: str, half: Half, told: list[str], raised: bool
) -> None:
    """A rank that raised in the middle of its call, or for what only it knows of this call, would leave the others."""
    done: list[str] = []
    names = {Half.SEND: "send", Half.TABLES: "tables", Half.ROWS: "rows", Half.RECEIVE: "receive"}

    def launch(shape: object, half: Half, *_: object) -> int:
        done.append(names[half])
        return int(names[half] in told)

    def raise_notice() -> None:
        done.append("raised")
        raise InputError("topk_idx", 99, "an expert must be less")

    step = SimpleNamespace(DISPATCH=0, TABLES=1, ROWS=2)
    monkeypatch.setattr(nvshmem, "module", lambda: SimpleNamespace(LatencyStep=step))
    monkeypatch.setattr(low_latency_cuda, "enter_stream", lambda index: 0)
    monkeypatch.setattr(nodes_module, "_C", SimpleNamespace(LATENCY_BROKEN=BROKEN))
    engine: Any = object.__new__(nodes_module.NodesEngine)
    engine._told_at, engine._packed, engine._index, engine.device = set(), {(4, 128): b""}, 0, torch.device("cpu")
    engine._engine = SimpleNamespace(dispatch=launch, combine=launch)
    engine._domain = SimpleNamespace(
        usable=True, enter_stream=lambda: 0, raise_failure=lambda: None, raise_notice=raise_notice
    )
    engine._remote = SimpleNamespace(
        exchange=lambda **_: done.append("exchange"), post=lambda stream: done.append("post")
    )
    one = torch.zeros(1, dtype=torch.int64, device="cpu")
    shape = SimpleNamespace(max_tokens=4, hidden=128, tokens=1, topk=1, num_experts=2, format=0, launch=object())
    call: Any = SimpleNamespace(
        shape=shape, x=one, topk_idx=one, memory=one, rows=one, scales=None, stats=None, wait_stats=None, sent=False
    )
    if kind == "combine":
        call = SimpleNamespace(
            x=one, topk_idx=one, topk_weights=one, dispatched=call, out=one, wait_stats=None, state=one, sent=False
        )
    with pytest.raises(InputError, match="topk_idx = 99") if raised else nullcontext():
        getattr(engine, kind)(call, half)
    launches = _LAUNCHES[kind]
    expected = {Half.BOTH: launches, Half.SEND: launches[:-1], Half.RECEIVE: ["exchange", "receive", "post"]}[half]
    assert done == [*expected, *["raised"] * raised]
    assert call.sent
