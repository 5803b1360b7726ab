"""What the benchmark measures the link with really stores what it says."""

from __future__ import annotations

import torch
import torch.distributed as dist

from deepep_moe.extension import _C
from deepep_moe.peer_memory import PeerMemory
from tests.gpu.conftest import Ranks


def test_fill_peers_stores_every_byte_and_no_other(ranks: Ranks) -> None:
    part, gap = 16 * 5000, 128  # no multiple of what a block stores
    memory = PeerMemory(ranks.group, ranks.device, (part + gap) * ranks.size)
    targets = [address + (part + gap) * ranks.rank for address in memory.addresses]
    _C.fill_peers(targets, part, 3, torch.cuda.current_stream(ranks.device).cuda_stream)
    torch.cuda.synchronize(ranks.device)
    dist.all_reduce(torch.zeros(1, dtype=torch.int32, device="cpu"), group=ranks.group)  # all have stored
    got = memory.local.view(torch.int32).view(ranks.size, (part + gap) // 4).cpu()
    vectors = torch.arange(part // 16, dtype=torch.int32, device="cpu")
    wanted = torch.zeros((part // 16, 4), dtype=torch.int32, device="cpu")
    wanted[:, 0], wanted[:, 1] = vectors % 1024, vectors // 1024 % 3  # thread and block
    for source in range(ranks.size):
        assert torch.equal(got[source, : part // 4], wanted.flatten()), f"from rank {source}"
        assert not got[source, part // 4 :].any(), f"behind the part of rank {source}"
