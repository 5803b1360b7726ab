"""Cases of overlap.py: whatever is overlapped, results and gradients are those of the plain calls."""

from __future__ import annotations

import torch
import torch.distributed as dist

from deepep_moe import DispatcherConfig, TokenDispatcher
from deepep_moe.overlap import Overlap
from tests.distributed.cases_dispatcher import local_matrices, moe, random_batch, run_experts
from tests.launch import case


@case()
def a_pipelined_layer_equals_the_plain_one(group: dist.ProcessGroup) -> None:
    for chunks in (1, 2, 5):
        config = DispatcherConfig(num_chunks=chunks, expert_alignment=4, timeout_seconds=20)
        dispatcher = TokenDispatcher(group, 2 * dist.get_world_size(group), config)
        _, own = local_matrices(dispatcher, 8)
        own.requires_grad_()
        tokens = 4 * dispatcher.rank  # none on rank 0, fewer than chunks on rank 1
        x, topk_idx, weights = random_batch(dispatcher.rank, tokens, 8, 2, dispatcher.num_experts, dropped=0.2)
        expected = moe(dispatcher, x, topk_idx, weights, own)
        out = Overlap(dispatcher).pipeline(
            lambda sent, own=own: run_experts(sent.rows, sent, own), x, topk_idx, weights
        )
        torch.testing.assert_close(out, expected)
        grad = torch.randn(out.shape)
        for got, wanted in zip(
            torch.autograd.grad(out, (x, weights, own), grad),
            torch.autograd.grad(expected, (x, weights, own), grad),
            strict=True,
        ):
            torch.testing.assert_close(got, wanted)


@case()
def the_pipeline_works_without_weights(group: dist.ProcessGroup) -> None:
    dispatcher = TokenDispatcher(group, 2 * dist.get_world_size(group), DispatcherConfig(num_chunks=3))
    x, topk_idx, _ = random_batch(dispatcher.rank, 7, 8, 2, dispatcher.num_experts)
    out = Overlap(dispatcher).pipeline(lambda sent: sent.rows, x, topk_idx)
    torch.testing.assert_close(out, 2 * x)


@case()
def what_is_begun_can_be_waited_for_in_any_order(group: dist.ProcessGroup) -> None:
    dispatcher = TokenDispatcher(group, 2 * dist.get_world_size(group))
    overlap = Overlap(dispatcher)
    batches = [random_batch(10 * i + dispatcher.rank, 5 + i, 8, 2, dispatcher.num_experts) for i in range(2)]
    sent = [overlap.begin_dispatch(*batch) for batch in batches]
    arrived = [s.wait() for s in reversed(sent)][::-1]
    back = [overlap.begin_combine(a.rows, a, weights=a.weights) for a in arrived]
    for tokens, (x, _, weights) in zip(reversed(back), reversed(batches), strict=True):
        torch.testing.assert_close(tokens.wait(), x * weights.sum(1, keepdim=True))


@case()
def a_plan_serves_several_dispatches(group: dist.ProcessGroup) -> None:
    dispatcher = TokenDispatcher(group, 2 * dist.get_world_size(group))
    x, topk_idx, weights = random_batch(dispatcher.rank, 6, 8, 2, dispatcher.num_experts)
    plan = dispatcher.plan(topk_idx)
    topk_idx.fill_(-1)  # the plan owns its copy, also until the backward
    for factor in (1, 3):
        sent = dispatcher.dispatch(x * factor, plan, weights)
        out = dispatcher.combine(sent.rows, sent, weights=sent.weights)
        torch.testing.assert_close(out, x * factor * weights.sum(1, keepdim=True))
        torch.testing.assert_close(
            torch.autograd.grad(out.sum(), x)[0], factor * weights.sum(1, keepdim=True).expand_as(x)
        )
