"""Cases for ``test_megatron.py``: outputs of a fixed size (``capacity_factor`` above 0) against exact sizes."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from deepep_moe.errors import CapacityError
from tests.distributed.megatron_refusal_cases import through
from tests.launch import case, on_ranks

_util = on_ranks("tests.distributed.megatron_util")


@case(ranks=(2,))
def one_forward_one_backward_overlap(group: dist.ProcessGroup) -> None:
    """Megatron's fine-grained schedule, against batches in turn."""
    util = _util()
    layout = util.parallel(ep=2)
    batches = [util.batch(step) for step in (1, 2, 3)]
    for shared in (None, 24):
        config = util.configure("deepep", moe_shared_expert_intermediate_size=shared, **layout)
        expected = util.run_in_turn(util.gpt(config, grouped_experts=True), batches)
        with util.capacity_mode():
            model = util.gpt(config, grouped_experts=True)
        rows = []
        for layer in model.decoder.layers:
            layer.mlp.experts.register_forward_pre_hook(lambda module, args, rows=rows: rows.append(args[0].shape[0]))
        util.assert_all_near(util.run_overlapped(model, batches), expected)
        for layer in model.decoder.layers:
            layer.mlp.token_dispatcher.dispatcher.backend.check()  # nothing overflowed
        assert rows == [2 * 2 * util.SEQUENCE * util.BATCH] * 2 * len(batches)  # factor, top-k, tokens; layers


@case(ranks=(2,))
def one_layer(group: dist.ProcessGroup) -> None:
    """Outputs of a fixed size against exact sizes."""
    util = _util()
    layout = util.parallel(ep=2)
    overlap = {"moe_shared_expert_intermediate_size": 24, "moe_shared_expert_overlap": True}
    drop = {"moe_expert_capacity_factor": 0.5}
    for tokens, options in (
        (util.SEQUENCE + dist.get_rank(), overlap),
        (util.SEQUENCE + dist.get_rank(), drop),
        (util.SEQUENCE, {**drop, "moe_pad_expert_input_to_capacity": True}),
    ):
        config = util.configure("deepep", **options, **layout)
        exact = util.moe_layer(config, grouped_experts=True)
        with util.capacity_mode(max_tokens_per_rank=(util.SEQUENCE + 1) * util.BATCH):
            fixed = util.moe_layer(config, grouped_experts=True)
        for seed in (1, 2):
            actual, expected = (util.run_layer(layer, tokens, seed) for layer in (fixed, exact))
            util.assert_all_near(actual, expected)
        fixed.token_dispatcher.dispatcher.backend.check()  # nothing overflowed


@case(ranks=(2,))
def data_parallel_models_replay_what_overflows(group: dist.ProcessGroup) -> None:
    """The setting alone: ``DistributedDataParallel`` makes the model replay. Logs count a forward once."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

    from deepep_moe.integrations.megatron.replay import _logged
    from deepep_moe.overflow import replay_of

    util = _util()
    config = util.configure("deepep", hidden_dropout=0.1, **util.parallel(ep=2))
    results = []
    for settings in ({"capacity_factor": 0.0}, {"capacity_factor": 0.3, "replay_on_overflow": 1}):
        with util.capacity_mode(**settings):
            model = util.gpt(config, grouped_experts=True)
            wrapped = DistributedDataParallel(config, DistributedDataParallelConfig(), model)
        for values in _logged().values():
            values.zero_()
        wrapped.zero_grad_buffer()
        found = {}
        for step in (1, 2):
            tokens, positions, mask, labels = util.batch(step)
            loss = wrapped(tokens, positions, mask, labels=labels)
            loss.mean().backward()
            found[f"loss {step}"] = loss.detach()
        wrapped.finish_grad_sync()
        found |= {name: parameter.main_grad.clone() for name, parameter in model.named_parameters()}
        found |= {f"log of {name}": values.clone() for name, values in _logged().items()}
        found |= {f"random {name}": state.float() for name, state in get_cuda_rng_tracker().get_states().items()}
        results.append(found)
        replay = replay_of(model)
        assert (replay is not None) == (settings["capacity_factor"] > 0)
    assert any(name.startswith("log of") for name in results[0])
    assert replay is not None and replay.forwards == 2 and replay.replays > 0
    util.assert_all_near(results[1], results[0])


@case(ranks=(2,))
def a_rank_without_tokens_is_told_which_settings_give_it_room(group: dist.ProcessGroup) -> None:
    """Its room follows from its own tokens, unless ``max_tokens_per_rank`` is set: no factor makes it more."""
    util = _util()
    config = util.configure("deepep", **util.parallel(ep=2))
    tokens = 8 * (1 - dist.get_rank())
    x = torch.randn(tokens, util.HIDDEN)
    routing_map = torch.zeros(tokens, util.EXPERTS, dtype=torch.bool)
    routing_map[:, 4:6] = True  # rank 1's
    with util.capacity_mode():
        dispatcher = util.moe_layer(config, grouped_experts=True).token_dispatcher
    needs = (
        "rank 1 needs room for 8 received tokens, but capacity_factor = 2 with max_tokens_per_rank = 0 .* room for 0"
    )
    with pytest.raises(CapacityError, match=needs):
        through(dispatcher, x, routing_map, routing_map.float())
    with util.capacity_mode(max_tokens_per_rank=8):
        dispatcher = util.moe_layer(config, grouped_experts=True).token_dispatcher
    for _ in range(2):
        torch.testing.assert_close(through(dispatcher, x, routing_map, routing_map.float()), 4 * x)
    dispatcher.dispatcher.backend.check()


@case(ranks=(2,))
def experts_that_want_no_more_rows_are_refused(group: dist.ProcessGroup) -> None:
    from deepep_moe.errors import ConfigError

    util = _util()
    layout = util.parallel(ep=2)
    padding = {"moe_expert_capacity_factor": 1.0, "moe_pad_expert_input_to_capacity": True}
    with util.capacity_mode(capacity_factor=1.5):
        with pytest.raises(ConfigError, match=r"capacity_factor = 1\.5 with experts of type SequentialMLP"):
            util.moe_layer(util.configure("deepep", **layout))
        util.moe_layer(util.configure("alltoall", **layout))
        for options in (padding, {"num_moe_experts": 2}):  # every row is an expert's
            config = util.configure("deepep", **{**layout, **options})
            fixed = util.run_layer(util.moe_layer(config), util.SEQUENCE)
            with util.capacity_mode(capacity_factor=0):
                util.assert_all_near(fixed, util.run_layer(util.moe_layer(config), util.SEQUENCE))
