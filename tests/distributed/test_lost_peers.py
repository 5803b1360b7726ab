"""Ranks that are lost, over gloo: who is named, how soon, and that the processes that are left end by themselves."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import dataclass
from typing import Any

import pytest
import torch.distributed as dist

from tests.distributed.lost_peer import FOR_EVER, LATE_SECONDS, TIMEOUT_SECONDS
from tests.launch import ROOT, environment

START_SECONDS = 60.0  # imports, on a busy machine
END_SECONDS = 15.0  # from the last thing that a process says to its end


@dataclass(frozen=True)
class Ended:
    """What a process said and how it ended."""

    status: int
    told: dict[str, dict[str, Any]]  # by call
    output: str
    seconds: float  # from its last line to its end


def run(ranks: int, how: str, device: str = "cpu") -> list[Ended]:
    """What became of all ranks but the last, which is killed in the end. The store lives here and outlasts them."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    processes = []
    try:
        for rank in range(ranks):
            place = [str(store.port), str(rank), str(ranks)]
            command = [sys.executable, "-m", "tests.distributed.lost_peer", *place, how, device]
            processes.append(
                subprocess.Popen(
                    command, cwd=ROOT, env=environment(), text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
                )
            )
        last = [processes.pop()] if how not in ("late", "failed inside a call") else []
        try:
            return [end(process) for process in processes]
        finally:
            processes += last
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
            process.wait()
            if process.stdout is not None:
                process.stdout.close()


def end(process: subprocess.Popen[str]) -> Ended:
    lines, said_last = [], time.monotonic()
    assert process.stdout is not None
    for line in process.stdout:
        lines.append(line)
        if '"state"' in line:
            said_last = time.monotonic()
    output = "".join(lines)
    status = process.wait(timeout=START_SECONDS + FOR_EVER)
    told = {t["call"]: t for t in (json.loads(line) for line in lines if line.startswith("{"))}
    assert {"first", "again", "another", "state"} <= set(told), output
    return Ended(status, told, output, time.monotonic() - said_last)


@pytest.mark.parametrize(
    ("how", "ranks", "error", "message", "at_most"),
    [
        ("asleep", 3, "PeerTimeoutError", "no answer from rank 2 within 2 s", TIMEOUT_SECONDS + 5),
        ("in a barrier", 2, "PeerTimeoutError", "no answer from rank 1 within 2 s", TIMEOUT_SECONDS + 5),
        ("killed", 3, "PeerError", "rank 2 may be gone", TIMEOUT_SECONDS),
    ],
)
def test_a_lost_peer_is_named_and_the_others_end(
    how: str, ranks: int, error: str, message: str, at_most: float
) -> None:
    for rank, ended in enumerate(run(ranks, how)):
        first = ended.told["first"]
        assert first["error"] == error, ended.output
        assert f"plan: rank {rank} of {ranks}: {message}" in first["message"]
        assert "Make a new group" in first["message"]
        assert first["seconds"] < at_most
        stays_broken(ended, message)
        assert ("rank 0 waited for its peers" in ended.output) == (rank == 0)  # debug_waits


def stays_broken(ended: Ended, message: str) -> None:
    """Later calls raise at once and say why, nothing new is made over the group, and the process ends by itself."""
    assert not ended.told["state"]["usable"]
    assert ended.told["again"]["error"] in ("PeerError", "PeerTimeoutError")
    assert ended.told["another"]["error"] == "PeerError"
    for call in ("again", "another"):
        assert message in ended.told[call]["message"]
        assert "given up after an earlier error" in ended.told[call]["message"]
        assert ended.told[call]["seconds"] < TIMEOUT_SECONDS / 2
    assert ended.status == 0, ended.output
    assert ended.seconds < END_SECONDS


def test_a_late_peer_is_told_that_it_is_late() -> None:
    waited, late = run(2, "late")
    assert "no answer from rank 1 within 2 s" in waited.told["first"]["message"]
    stays_broken(waited, "no answer from rank 1")
    assert "rank 1 of 2 came too late: rank 0 had given up after 2" in late.told["first"]["message"], late.output
    assert late.told["first"]["seconds"] < TIMEOUT_SECONDS < LATE_SECONDS
    stays_broken(late, "came too late")


def test_the_exchange_of_reasons_is_bounded() -> None:
    """Rank 0 refuses its input, and a peer is lost before it can be told."""
    refusing, told = run(3, "silent after a refusal")
    assert refusing.told["first"]["error"] == "InputError"
    assert "topk_idx" in refusing.told["first"]["message"]
    assert told.told["first"]["error"] == "PeerTimeoutError"
    for ended in (refusing, told):
        assert ended.told["first"]["seconds"] < TIMEOUT_SECONDS + 5
        stays_broken(ended, "no answer from rank 2 within 2 s")


def test_a_rank_that_fails_inside_a_call_says_so() -> None:
    """What only one rank runs into (no memory, say) after all have agreed: the others do not wait for it."""
    told, failed = run(2, "failed inside a call")
    assert failed.told["first"]["error"] == "MemoryError"
    stays_broken(failed, "this rank broke off: MemoryError: no memory for the routes")
    assert told.told["first"]["error"] == "PeerError"
    assert "rank 1 broke off plan: MemoryError: no memory for the routes" in told.told["first"]["message"]
    assert told.told["first"]["seconds"] < TIMEOUT_SECONDS
    stays_broken(told, "no memory for the routes")
