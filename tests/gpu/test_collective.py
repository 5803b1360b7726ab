"""The collective backend over NCCL: a lost peer is named in time, and what is left ends by itself.

NCCL refuses several ranks on one GPU, so the ranks are processes of their own, with a GPU each, that rank 0 starts.
"""

from __future__ import annotations

import pytest
import torch

from tests.distributed.lost_peer import TIMEOUT_SECONDS
from tests.distributed.test_lost_peers import END_SECONDS, START_SECONDS, run
from tests.gpu.conftest import Ranks
from tests.gpu.test_robustness import mps_is_running, on_first_rank


@pytest.mark.timeout(3 * START_SECONDS)
@pytest.mark.parametrize("how", ["asleep", "killed"])
def test_a_lost_peer_is_named_and_the_other_ends(ranks: Ranks, how: str) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    if mps_is_running():
        pytest.skip("must not run under CUDA MPS: a killed client can take the server's other clients with it")
    (ended,) = on_first_rank(ranks, lambda: run(2, how, "cuda"))
    first, again = ended.told["first"], ended.told["again"]
    assert first["error"] == "PeerTimeoutError", ended.output
    assert "plan: rank 0 of 2: no answer from rank 1 within 2 s" in first["message"]
    assert first["seconds"] < TIMEOUT_SECONDS + 5
    assert again["error"] == "PeerTimeoutError" and again["seconds"] < TIMEOUT_SECONDS / 2
    assert "given up after an earlier error" in again["message"]
    assert not ended.told["state"]["usable"]
    assert ended.status == 0, ended.output
    assert ended.seconds < END_SECONDS
