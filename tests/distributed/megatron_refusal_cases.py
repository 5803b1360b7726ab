"""Cases for ``test_megatron.py``: what goes wrong on one rank is an error on all of them, at once and by name."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from deepep_moe.errors import InputError, PeerError, RankMismatchError
from tests.launch import case, on_ranks

_util = on_ranks("tests.distributed.megatron_util")
AT_ONCE = 20.0  # seconds, on a busy machine; a rank that nobody tells anything waits for timeout_seconds, 100


@contextlib.contextmanager
def refused(wrong: bool, error: type[Exception], message: str) -> Iterator[None]:
    """On the rank that is ``wrong`` its own error; on the others that error's text. Soon."""
    started = time.monotonic()
    with pytest.raises(error if wrong else PeerError, match=message) as raised:
        yield
    assert wrong or "was refused by another rank of the group: rank 1: " in str(raised.value)
    assert time.monotonic() - started < AT_ONCE


def routing_of(tokens: int, experts: int, routes: int = 2) -> Tensor:
    """A map in which every token has this many routes."""
    start = torch.arange(tokens).unsqueeze(1) + 3 * torch.arange(routes)
    return torch.zeros(tokens, experts, dtype=torch.bool).scatter(1, start % experts, True)


def through(dispatcher: Any, x: Tensor, routing_map: Any, probs: Any) -> Tensor:
    """All six phases around experts that double their rows and apply the probabilities."""
    rows, probs = dispatcher.token_dispatch(*dispatcher.dispatch_preprocess(x, routing_map, probs))
    rows, _, probs = dispatcher.dispatch_postprocess(rows, probs)
    rows = dispatcher.combine_preprocess(2 * rows * probs.unsqueeze(1))
    return dispatcher.combine_postprocess(dispatcher.token_combine(rows))


@case(ranks=(2,))
def bad_routing_is_refused_on_all_ranks(group: dist.ProcessGroup) -> None:
    util = _util()
    overlap = {"moe_shared_expert_intermediate_size": 24, "moe_shared_expert_overlap": True}
    layout = util.parallel(ep=2)
    for options in ({}, overlap):
        dispatcher = util.moe_layer(util.configure("deepep", **options, **layout)).token_dispatcher
        x, good = torch.ones(3, util.HIDDEN), routing_of(3, util.EXPERTS)
        expected = through(dispatcher, x, good, good.float())
        for routing_map, probs, message in (
            (
                routing_of(3, 8, routes=5),
                good.float(),
                "5 routes in a row: at most moe_router_topk = 2 routes per token",
            ),
            (good.int(), good.float(), r"torch.int32 \[3, 8\]"),
            (good[:2], good.float(), r"shape \[3, 8\] \(tokens, experts\)"),
            (good, good.float()[:, :4], r"shape \[3, 8\] \(tokens, experts\)"),
            (good, good, "probs = torch.bool: must be floating point"),
            (None, good.float(), "routing_map = NoneType: must be a torch.Tensor"),
            (good, good.float().numpy(), "probs = ndarray: must be a torch.Tensor"),
            (good.to("meta"), good.float(), "routing_map = meta: must be on cpu, the device of hidden_states"),
        ):
            wrong = dist.get_rank() == 1
            with refused(wrong, InputError, message):
                if wrong:
                    through(dispatcher, x, routing_map, probs)
                else:
                    through(dispatcher, x, good, good.float())
            assert torch.equal(through(dispatcher, x, good, good.float()), expected)


@case(ranks=(2,))
def errors_of_router_and_experts_are_told_to_all(group: dist.ProcessGroup) -> None:
    """Of the caller's own modules too, with and without recomputation; the layer works again afterwards."""
    util = _util()
    layout = util.parallel(ep=2)
    wrong = dist.get_rank() == 1

    def fail(*args: Any) -> None:
        raise ValueError("not today")

    def route_to_all(module: Any, args: Any, output: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return output[0], torch.ones_like(output[1])

    recompute = {"recompute_granularity": "selective", "recompute_modules": ["moe"]}
    overlap = {"moe_shared_expert_intermediate_size": 24, "moe_shared_expert_overlap": True}
    for options in ({}, recompute, overlap):
        layer = util.moe_layer(util.configure("deepep", **options, **layout))
        expected = {name: value.clone() for name, value in util.run_layer(layer, 4).items()}
        for module, hook, error, message in (
            (layer.router, fail, ValueError, "not today"),
            (layer.experts, fail, ValueError, "not today"),
            (layer.experts.local_experts[2], fail, ValueError, "not today"),
            (layer.router, route_to_all, InputError, "8 routes in a row: at most moe_router_topk = 2"),
        ):
            handle = module.register_forward_hook(hook) if wrong else None
            with refused(wrong, error, message):
                util.run_layer(layer, 4)
            if handle is not None:
                handle.remove()
            util.assert_all_near(util.run_layer(layer, 4), expected)
        for given in (None, [[0.5]]):
            with refused(wrong, InputError, "hidden_states = (None|a list): must be a torch.Tensor"):
                layer(given if wrong else torch.ones(4, 1, util.HIDDEN))
        util.assert_all_near(util.run_layer(layer, 4), expected)


@case(ranks=(2,))
def a_rank_without_tokens(group: dist.ProcessGroup) -> None:
    """The dispatcher serves it. Megatron-Core's router does not, and then all ranks hear of it."""
    util = _util()
    layout = util.parallel(ep=2)
    tokens = 5 * dist.get_rank()
    for options in ({}, {"moe_shared_expert_intermediate_size": 24, "moe_shared_expert_overlap": True}):
        dispatcher = util.moe_layer(util.configure("deepep", **options, **layout)).token_dispatcher
        x = torch.randn(tokens, util.HIDDEN, generator=torch.Generator().manual_seed(1)).requires_grad_()
        routing_map = routing_of(tokens, util.EXPERTS)
        probs = (routing_map * torch.arange(1.0, util.EXPERTS + 1)).requires_grad_()
        out = through(dispatcher, x, routing_map, probs)
        if dispatcher.shared_experts is not None:
            out = out - dispatcher.shared_experts(x.detach()).detach()
        total = probs.detach().sum(1, keepdim=True)
        torch.testing.assert_close(out, 2 * total * x.detach())
        x_grad, probs_grad = torch.autograd.grad(out.sum(), (x, probs))
        if dispatcher.shared_experts is None:
            torch.testing.assert_close(x_grad, (2 * total).expand_as(x))
        torch.testing.assert_close(probs_grad, routing_map * 2 * x.detach().sum(1, keepdim=True))
    layer = util.moe_layer(util.configure("deepep", **layout))
    started = time.monotonic()
    with pytest.raises(RuntimeError, match="cannot reshape tensor of 0 elements"):
        util.run_layer(layer, tokens)
    assert time.monotonic() - started < AT_ONCE


@case(ranks=(2,))
def padding_to_capacity_wants_equal_batches(group: dist.ProcessGroup) -> None:
    """Rank 1 expects no more than its own share of the tokens, which are few, and gets more."""
    util = _util()
    layout = util.parallel(ep=2)
    padding = {"moe_expert_capacity_factor": 1.0, "moe_pad_expert_input_to_capacity": True}
    dispatcher = util.moe_layer(util.configure("deepep", **padding, **layout)).token_dispatcher
    wrong = dist.get_rank() == 1
    tokens = 2 if wrong else 40
    routing_map = torch.zeros(tokens, util.EXPERTS, dtype=torch.bool)
    routing_map[:, 4:6] = True
    with refused(wrong, InputError, "the same number of tokens on all ranks: this rank's capacity allows 2 rows"):
        through(dispatcher, torch.zeros(tokens, util.HIDDEN), routing_map, routing_map.float())


@case(ranks=(2,))
def ranks_that_differ_in_what_they_train_are_told(group: dist.ProcessGroup) -> None:
    """One that has no backward to run would keep the others waiting in theirs. What differs less works."""
    util = _util()
    layout = util.parallel(ep=2)
    rank = dist.get_rank()

    def run(frozen: Callable[[str], bool], x_wants: bool) -> None:
        layer = util.moe_layer(util.configure("deepep", **layout))
        for name, parameter in layer.named_parameters():
            parameter.requires_grad_(not frozen(name))
        x = torch.randn(4, 2, util.HIDDEN, generator=torch.Generator().manual_seed(rank)).requires_grad_(x_wants)
        output, _ = layer(x)
        output.square().sum().backward()
        wanted = {name for name, parameter in layer.named_parameters() if parameter.requires_grad}
        assert util.gradients(layer).keys() == wanted
        assert (x.grad is not None) is x_wants

    run(lambda name: False, x_wants=rank == 0)
    run(lambda name: "router" in name and rank == 0, x_wants=True)
    run(lambda name: "experts" in name and rank == 0, x_wants=True)
    started = time.monotonic()
    with pytest.raises(RankMismatchError, match="backward differs between the ranks of the group: none on rank 0"):
        run(lambda name: rank == 0, x_wants=rank == 1)
    assert time.monotonic() - started < AT_ONCE
