"""Numbers and names for those who watch: TokenDispatcher.stats(), ranges in profiles, warnings once per job."""

from __future__ import annotations

import logging

import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile

from deepep_moe import DispatcherConfig, TokenDispatcher, notices
from tests.launch import case


def through(dispatcher: TokenDispatcher, x: torch.Tensor, topk_idx: torch.Tensor) -> None:
    sent = dispatcher.dispatch(x, topk_idx, torch.ones(topk_idx.shape))
    dispatcher.combine(sent.rows, sent, weights=sent.weights)


@case(ranks=(1, 2, 4))
def what_was_moved_is_counted(group: dist.ProcessGroup) -> None:
    world, rank = dist.get_world_size(group), dist.get_rank(group)
    dispatcher = TokenDispatcher(group, 2 * world, DispatcherConfig(expert_alignment=4))
    x, topk_idx = torch.ones(6, 8), torch.tensor([[0, 1]] * 5 + [[2 * rank, -1]])  # five tokens to rank 0, one stays
    through(dispatcher, x, topk_idx)  # before counting
    first = dispatcher.stats()
    assert (first["dispatches"], first["tokens"], int(first["load"].sum())) == (0, 0, 0)

    for _ in range(3):
        through(dispatcher, x, topk_idx)
    counted = dispatcher.stats()
    assert (counted["dispatches"], counted["tokens"]) == (3, 18)
    expected = [5 * world + 1, 5 * world] if rank == 0 else [1, 0]
    assert counted["load"].tolist() == [3 * rows for rows in expected]  # padding is not counted
    sent = 0 if rank == 0 else 15
    assert int(counted["sent_rows"]) == sent
    assert int(counted["sent_bytes"]) == sent * (8 * 4 + 2 * 4)
    assert set(counted["waits"]) == {"plan", "dispatch", "combine"}
    assert all(seconds >= 0 for seconds in counted["waits"].values())
    assert dispatcher.stats()["dispatches"] == 0

    fp8 = TokenDispatcher(group, 2 * world, DispatcherConfig(fp8_dispatch=True))
    fp8.stats()
    through(fp8, torch.ones(6, 256, dtype=torch.bfloat16), topk_idx)
    assert int(fp8.stats()["sent_bytes"]) == sent // 3 * (256 + 2 * 4 + 2 * 4)


@case(ranks=(2,))
def profiles_name_the_calls(group: dist.ProcessGroup) -> None:
    dispatcher = TokenDispatcher(group, 4, DispatcherConfig())
    x = torch.ones(6, 8, requires_grad=True)
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        sent = dispatcher.dispatch(x, torch.arange(6).unsqueeze(1) % 4, torch.ones(6, 1))
        dispatcher.combine(sent.rows, sent, weights=sent.weights).sum().backward()
    counts = {event.key: event.count for event in profiler.key_averages() if event.key.startswith("deepep_moe.")}
    assert counts["deepep_moe.plan"] == 1
    assert counts["deepep_moe.dispatch"] == counts["deepep_moe.combine"] == 2  # forward and backward
    assert counts["deepep_moe.wait plan"] >= 1


@case(ranks=(2,))
def settings_without_effect_are_one_warning_on_rank_0(group: dist.ProcessGroup) -> None:
    told: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: told.append(f"{record.levelname} {record.getMessage()}")
    logger = logging.getLogger("deepep_moe")
    logger.addHandler(handler)
    notices._warned.clear()
    try:
        for seconds in (10, 11):  # two backends
            settings = {"num_sms": 24, "rail_chunk_bytes": 1 << 20, "replay_on_overflow": True}
            TokenDispatcher(group, 4, DispatcherConfig(backend="collective", timeout_seconds=seconds, **settings))
    finally:
        logger.removeHandler(handler)
    expected = [
        "WARNING deepep_moe: num_sms = 24 has no effect: backend collective does not use it",
        "WARNING deepep_moe: rail_chunk_bytes = 1048576 has no effect: backend collective does not use it",
        "WARNING deepep_moe: replay_on_overflow has no effect: capacity_factor is 0, so nothing overflows",
    ]
    assert [line for line in told if line.startswith("WARNING")] == (expected if dist.get_rank() == 0 else [])
