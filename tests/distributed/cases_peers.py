"""Cases of peers that do not answer. Own module: a group that timed out is of no further use."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from deepep_moe import DispatcherConfig, ElasticBuffer, TokenDispatcher
from deepep_moe.backends import Layout, get_backend
from deepep_moe.domain import Domain
from deepep_moe.errors import CapacityError, PeerError, PeerTimeoutError
from deepep_moe.overflow import replay_on_overflow
from tests.distributed.cases_dispatcher import raises
from tests.launch import GROUP_TIMEOUT, case

BOUND = 20.0  # seconds: 1 for the peer, up to 4 to find out who it is, the rest for a busy machine


@contextmanager
def bounded_wait() -> Iterator[None]:
    """The wait ends by ``timeout_seconds``, not by the timeout of the group (60 s) or of the default group (120 s)."""
    began = time.monotonic()
    yield
    waited = time.monotonic() - began
    assert 0.9 < waited < BOUND, f"waited {waited:.1f} s instead of 1 s"


def silence(group: dist.ProcessGroup, phase: str) -> None:
    """The last rank leaves before ``phase``; the others must be told within the configured second."""
    config = DispatcherConfig(timeout_seconds=1)
    backend = get_backend(group, torch.device("cpu"), config)
    topk_idx = torch.arange(2 * backend.world_size).unsqueeze(1)  # a token for every rank
    steps: dict[str, Callable[[], object]] = {}
    if phase != "plan":
        plan = backend.plan(topk_idx, 2 * backend.world_size)
        rows = torch.ones(plan.num_tokens, 4)
        steps["dispatch"] = lambda: backend.dispatch(plan, rows, layout=Layout.BY_EXPERT)
        steps["combine"] = lambda: backend.combine(plan, torch.ones(plan.num_rows, 4), layout=Layout.BY_EXPERT)
    steps["plan"] = lambda: backend.plan(topk_idx, 2 * backend.world_size)
    silent = backend.world_size - 1
    if backend.rank != silent:
        with (
            bounded_wait(),
            raises(
                PeerTimeoutError,
                f"{phase}: rank {backend.rank} of {backend.world_size}: no answer from rank {silent} within 1 s",
            ),
        ):
            steps[phase]()
    dist.barrier()  # of the default group: the silent rank waits here


@case(ranks=(2,))
def an_interrupted_wait_ends_the_group(group: dist.ProcessGroup) -> None:
    """Messages of the call that was left must not be taken for those of the next one. (gloo ends the process.)"""
    backend = get_backend(group, torch.device("cpu"), DispatcherConfig(timeout_seconds=20))
    topk_idx = torch.arange(4).unsqueeze(1)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    backend.plan(topk_idx, 4)
    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        if backend.rank == 0:
            signal.setitimer(signal.ITIMER_REAL, 0.2)
            try:
                backend.plan(topk_idx, 4)
                raise AssertionError("the wait was not interrupted")
            except KeyboardInterrupt:
                pass
        else:
            time.sleep(1.5)
            with raises(PeerError, "rank 0 broke off plan: KeyboardInterrupt()"):
                backend.plan(topk_idx, 4)
        with raises(PeerError, "given up", "broke off", "KeyboardInterrupt()"):
            backend.plan(topk_idx, 4)
    finally:
        signal.signal(signal.SIGALRM, before)


@case(ranks=(2, 3))
def silence_in_plan_is_a_timeout(group: dist.ProcessGroup) -> None:
    silence(group, "plan")


@case(ranks=(2, 3))
def silence_in_dispatch_is_a_timeout(group: dist.ProcessGroup) -> None:
    silence(group, "dispatch")


@case(ranks=(2, 3))
def silence_in_combine_is_a_timeout(group: dist.ProcessGroup) -> None:
    silence(group, "combine")


@case(ranks=(2, 3))
def silence_in_a_barrier_is_a_timeout(group: dist.ProcessGroup) -> None:
    buffer = ElasticBuffer(group, num_gpu_timeout_secs=1)
    buffer.barrier()
    silent = buffer.num_ranks - 1
    if buffer.rank_idx != silent:
        with (
            bounded_wait(),
            raises(PeerTimeoutError, f"barrier: rank {buffer.rank_idx}", f"no answer from rank {silent} within 1 s"),
        ):
            buffer.barrier()
    dist.barrier()  # of the default group: the silent rank waits here


@case(ranks=(2, 3))
def silence_in_the_set_up_is_a_timeout(group: dist.ProcessGroup) -> None:
    """What ranks exchange before a backend exists: settings, hosts, peer access."""
    config = DispatcherConfig(timeout_seconds=1, backend="hierarchical", ranks_per_node=1)
    others = dist.new_group(timeout=GROUP_TIMEOUT)
    rank, silent = dist.get_rank(group), dist.get_world_size(group) - 1
    if rank != silent:
        no_answer = f"set-up: rank {rank} of {silent + 1}: no answer from rank {silent} within 1 s"
        with bounded_wait(), raises(PeerTimeoutError, no_answer):
            get_backend(group, torch.device("cpu"), config)
        with bounded_wait(), raises(PeerTimeoutError, no_answer):
            Domain.supports(others, torch.device("cuda", 0), config.timeout_seconds)
    dist.barrier()  # of the default group: the silent rank waits here


@case(ranks=(2, 3))
def replay_of_some_ranks_only_is_a_timeout(group: dist.ProcessGroup) -> None:
    """A rank that does not replay raises its CapacityError and leaves; those that do wait for it, but not for long."""
    world, rank = dist.get_world_size(group), dist.get_rank(group)
    config = DispatcherConfig(capacity_factor=0.5, timeout_seconds=1)
    dispatcher = TokenDispatcher(group, 2 * world, config)
    topk_idx = torch.zeros((8, 1), dtype=torch.int64)  # all tokens to one expert

    class Layer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.dispatcher = dispatcher

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            sent = self.dispatcher.dispatch(x, topk_idx)
            return self.dispatcher.combine(sent.rows, sent)

    layer = Layer()
    if rank == world - 1:
        with raises(CapacityError, "capacity_factor = 0.5"):
            layer(torch.ones(8, 4))
    else:
        replay_on_overflow(layer, group=group)
        with bounded_wait(), raises(PeerTimeoutError, "replay", f"no answer from rank {world - 1} within 1 s"):
            layer(torch.ones(8, 4))
    dist.barrier()  # of the default group: the last rank waits here
