"""``python -m deepep_moe nvshmem``: test NVSHMEM between the GPUs of a run, within about a minute.

Under torchrun every rank sends patterned data with signals to every other rank and checks what arrives. The command
also measures bandwidth and latency of each pair of ranks.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from deepep_moe import nvshmem
from deepep_moe.backends.exchange import gather
from deepep_moe.config import DispatcherConfig
from deepep_moe.errors import ConfigError, DeepEPMoEError, PeerError, PeerTimeoutError
from deepep_moe.nvshmem_transports import NodeFacts, look, summary
from deepep_moe.tools.world import ranks_of_this_run

_CHUNK_BYTES = 256 << 10
_MANY_CHUNKS = 64  # 16 MiB in flight
_SIGNALS = 2 * _MANY_CHUNKS * 8
_PART_BYTES = 2 * _MANY_CHUNKS * _CHUNK_BYTES + _SIGNALS


@dataclass
class Shift:
    """Measured by one rank while every rank sent to the rank that is ``shift`` after it."""

    to: int
    wrong_words: int
    gigabytes_per_second: float
    microseconds: float
    """One-way latency: half of a round trip of 8 bytes with a signal."""
    mapped: bool


class Prober:
    """Runs csrc/nvshmem/probe.cu over a group."""

    def __init__(self, peers: nvshmem.Peers) -> None:
        self.peers = peers
        self.rank, self.size = dist.get_rank(peers.group), dist.get_world_size(peers.group)
        self._part = peers.take(_PART_BYTES)
        self._round = 1
        self._record = torch.zeros(5, dtype=torch.int64, device="cpu", pin_memory=True)
        self._failed = torch.zeros(1, dtype=torch.int32, device=peers.device)
        self._wrong = torch.zeros(1, dtype=torch.int64, device=peers.device)

    def shift(self, shift: int) -> Shift:
        """Send to the rank ``shift`` after this one, receive from the one as far before. Collective."""
        to = (self.rank + shift) % self.size
        self._run(shift, rounds=1, chunks=1, chunk_bytes=8, check=True)  # warm-up
        self._run(shift, rounds=20, chunks=_MANY_CHUNKS, chunk_bytes=_CHUNK_BYTES, check=True)
        wrong = int(self._wrong.item())
        self._wrong.zero_()
        rounds = 20
        seconds = self._run(shift, rounds=rounds, chunks=_MANY_CHUNKS, chunk_bytes=_CHUNK_BYTES, check=False)
        rate = rounds * _MANY_CHUNKS * _CHUNK_BYTES / seconds * 1e-9
        turns = 500
        latency = self._run(shift, rounds=turns, chunks=1, chunk_bytes=8, check=False) / turns / 2
        mapped = nvshmem.module().mapped_address(self._part.address, self.peers.pes[to]) != 0
        return Shift(to, wrong, rate, latency * 1e6, mapped)

    def _run(self, shift: int, *, rounds: int, chunks: int, chunk_bytes: int, check: bool) -> float:
        """Seconds on the device."""
        to, source = (self.rank + shift) % self.size, (self.rank - shift) % self.size
        peers, memory = self.peers, self._part.address
        self._meet()
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        stream = torch.cuda.current_stream(peers.device)
        began.record(stream)
        half = _MANY_CHUNKS * _CHUNK_BYTES
        nvshmem.module().probe(
            record=self._record.data_ptr(),
            failed=self._failed.data_ptr(),
            timeout_seconds=peers.timeout_seconds,
            rank=self.rank,
            to=to,
            from_=source,
            to_pe=peers.pes[to],
            from_pe=peers.pes[source],
            sent=memory,
            received=memory + half,
            arrived=memory + 2 * half,
            taken=memory + 2 * half + _SIGNALS // 2,
            first_round=self._round,
            rounds=rounds,
            chunks=chunks,
            chunk_bytes=chunk_bytes,
            check=check,
            wrong=self._wrong.data_ptr(),
            stream=stream.cuda_stream,
        )
        ended.record(stream)
        ended.synchronize()
        self._round += rounds
        self._raise_failure()
        return began.elapsed_time(ended) * 1e-3

    def _meet(self) -> None:
        torch.cuda.synchronize(self.peers.device)
        gather("self-test", self.peers.group, self.peers.device, self.peers.timeout_seconds, 0)

    def _raise_failure(self) -> None:
        failed, phase, peer, expected, seen = self._record.tolist()
        if failed:
            nvshmem.do_not_finalize()
            what = "rows of" if phase == 0 else "the answer of"
            raise PeerTimeoutError(
                f"rank {self.rank} waited {self.peers.timeout_seconds:g} s for {what} rank {peer}: "
                f"round {expected} was expected, {seen} was seen"
            )


def table(rows: Sequence[Sequence[str]]) -> str:
    """Columns, aligned."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join("  ".join(text.rjust(width) for text, width in zip(row, widths)) for row in rows)


def measure(peers: nvshmem.Peers) -> tuple[list[list[Shift]], str]:
    """Measurements [rank][shift - 1] of all ranks, and the transport to ranks that are not mapped. Collective."""
    prober = Prober(peers)
    mine = [vars(prober.shift(shift)) for shift in range(1, prober.size)]
    told = gather("self-test", peers.group, peers.device, peers.timeout_seconds, mine)
    return [[Shift(**one) for one in row] for row in told], nvshmem.module().remote_transport()


def report(measured: list[list[Shift]], remote: str) -> tuple[str, bool]:
    """The report as text, and whether all received data was correct."""
    ranks = len(measured)

    def matrix(title: str, text: Any) -> str:
        rows = [["from/to", *(str(rank) for rank in range(ranks))]]
        for rank, shifts in enumerate(measured):
            cells = {shift.to: text(shift) for shift in shifts}
            rows.append([str(rank), *(cells.get(to, "-") for to in range(ranks))])
        return f"{title}\n{table(rows)}"

    wrong = sum(shift.wrong_words for shifts in measured for shift in shifts)
    parts = [
        matrix("transport", lambda shift: "P2P" if shift.mapped else remote),
        matrix("GB/s, all ranks sending at once", lambda shift: f"{shift.gigabytes_per_second:.1f}"),
        matrix("latency, us, one way, 8 bytes and a signal", lambda shift: f"{shift.microseconds:.1f}"),
        f"values: {f'{wrong} words of 8 bytes were wrong or arrived after their signal' if wrong else 'all correct'}",
    ]
    return "\n\n".join(parts), not wrong


def main(arguments: Sequence[str]) -> int:
    """Run the command. Returns the exit status: 0 if all received data was correct."""
    parser = argparse.ArgumentParser(
        prog="torchrun --nproc-per-node 2 -m deepep_moe nvshmem",
        description="Send patterned rows with signals between all ranks by NVSHMEM, check them, measure each pair.",
    )
    parser.add_argument("--timeout", type=float, default=30.0, help="longest wait for another rank, in seconds")
    asked = parser.parse_args(arguments)
    try:
        config = DispatcherConfig(timeout_seconds=asked.timeout, nvshmem_bytes=_PART_BYTES + (1 << 20))
    except ConfigError as error:
        parser.error(str(error))
    with ranks_of_this_run() as world:
        everyone = dist.group.WORLD
        assert everyone is not None
        facts = gather("self-test", everyone, world.device, asked.timeout, look().as_dict())
        nodes = list({one["host"]: NodeFacts(**one) for one in facts}.values())
        text, missing = summary(nodes) if len(nodes) > 1 else ("one node", [])
        lines = [f"expected: {text}", *(f"  missing: {one}" for one in missing)]
        good, alone = False, False
        try:
            began = time.monotonic()
            peers = nvshmem.initialize(everyone, world.device, config)
            version = ".".join(map(str, nvshmem.module().loaded_version()))
            lines.append(f"NVSHMEM {version}, PEs {list(peers.pes)}, started in {time.monotonic() - began:.1f} s\n")
            result, good = report(*measure(peers))
            lines.append(result)
        except DeepEPMoEError as error:
            lines.append(f"failed: {error}")
            alone = isinstance(error, PeerError)  # perhaps on this rank alone; other errors are raised on all
        if world.rank == 0 or alone:
            start = "" if world.rank == 0 else f"rank {world.rank}\n"
            sys.stdout.write(start + "\n".join(lines) + "\n")  # in one piece: ranks write to one terminal
            sys.stdout.flush()
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
