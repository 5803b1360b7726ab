"""Megatron-Core and DeepSpeed on two nodes of two ranks: the same as their own dispatchers."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import torch.distributed as dist

from tests.launch import case, on_ranks

_megatron = on_ranks("tests.distributed.megatron_util")
_deepspeed = on_ranks("tests.distributed.deepspeed_util")
SETTINGS = {"backend": "hierarchical", "ranks_per_node": 2, "rail_chunk_bytes": 400}


@contextmanager
def nodes() -> Iterator[None]:
    """What Megatron's plugin makes in here is on two nodes."""
    variables = {f"DEEPEP_MOE_{name.upper()}": str(value) for name, value in SETTINGS.items()}
    with mock.patch.dict(os.environ, variables):
        yield


if importlib.util.find_spec("megatron") is not None:

    @case(ranks=(4,))
    def megatron_layer(group: dist.ProcessGroup) -> None:
        util = _megatron()
        with nodes():
            layer, _ = util.assert_same_layer(moe_shared_expert_intermediate_size=24, **util.parallel(ep=4))
            assert layer.token_dispatcher.dispatcher.backend.name == "hierarchical"

    @case(ranks=(4,))
    def megatron_one_forward_one_backward_overlap(group: dist.ProcessGroup) -> None:
        util = _megatron()
        layout = util.parallel(ep=4)
        batches = [util.batch(step) for step in (1, 2, 3)]
        with nodes():
            model = util.gpt(util.configure("deepep", **layout))
            expected = {name: value.clone() for name, value in util.run_in_turn(model, batches).items()}
            model.zero_grad()
            util.assert_all_near(util.run_overlapped(model, batches), expected)


if importlib.util.find_spec("deepspeed") is not None:

    @case(ranks=(4,))
    def deepspeed_layer(group: dist.ProcessGroup) -> None:
        util = _deepspeed()
        for drop in (False, True):
            util.parity(util.Setup(k=2, drop=drop, ep_size=4, stage=1, settings=SETTINGS))
        util.parity(util.Setup(k=2, ep_size=4, settings={**SETTINGS, "num_chunks": 2}))
