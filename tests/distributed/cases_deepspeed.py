"""Parity of native MoE with stock DeepSpeed over gloo, and what the plugin adds."""

from __future__ import annotations

import importlib.util

import torch.distributed as dist

from tests.distributed.deepspeed_util import GatedMLP, Setup, WithBiasBeside, narrow_mlp, parity
from tests.launch import case, include

AUTOCAST = {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}}
REPLAYED = {"capacity_factor": 0.3, "replay_on_overflow": True}
MATRIX = {
    **{
        f"{'capacity' if drop else 'dropless'}_top{k}": Setup(k=k, drop=drop)
        for k in (1, 2, 3)
        for drop in (False, True)
    },
    "residual_dropless": Setup(k=2, residual=True),
    "residual_capacity": Setup(k=1, drop=True, residual=True),
    "one_rank_per_expert_group": Setup(k=2, ep_size=1),
    "one_rank_per_expert_group_capacity": Setup(k=3, drop=True, ep_size=1),
    "zero1": Setup(k=2, stage=1),
    "zero2": Setup(k=1, drop=True, stage=2),
    "zero2_dropless": Setup(k=3, stage=2),
    "bf16_zero1": Setup(k=2, stage=1, bf16=True),
    "bf16_zero2": Setup(k=1, drop=True, stage=2, bf16=True),
    "accumulated": Setup(k=2, residual=True, accumulate=3),
    "accumulated_zero1": Setup(k=1, drop=True, stage=1, accumulate=2),
    "accumulated_zero2": Setup(k=2, residual=True, stage=2, accumulate=2),
    "evaluated_between_steps": Setup(k=2, residual=True, stage=1, evaluate=True),
    "evaluated_between_steps_capacity": Setup(k=1, drop=True, stage=2, evaluate=True, accumulate=2),
    "frozen_experts": Setup(k=2, frozen=True, evaluate=True),
    "frozen_experts_zero2": Setup(k=2, frozen=True, stage=2),
    "groups_of_two_sizes": Setup(k=2, ep_size=(1, 2), residual=True),
    "groups_of_two_sizes_zero1": Setup(k=1, drop=True, ep_size=(2, 1), stage=1),
    "groups_of_two_sizes_zero2": Setup(k=2, ep_size=(2, 1), stage=2, accumulate=2),
    "autocast_by_ds_config": Setup(k=2, stage=1, clear_routes=True, further=AUTOCAST),
    "checkpointed": Setup(k=2, reentrant=False),
    "checkpointed_reentrant": Setup(k=2, reentrant=True, stage=1),
    "gated_experts": Setup(k=2, expert=GatedMLP),
    "narrow_experts": Setup(k=2, expert=narrow_mlp),
    "narrow_experts_capacity": Setup(k=3, expert=narrow_mlp, drop=True, stage=1),
    "narrow_experts_bf16": Setup(k=2, expert=narrow_mlp, stage=2, bf16=True),
    "narrow_experts_in_chunks": Setup(k=2, expert=narrow_mlp, settings={"num_chunks": 2}),
    "narrow_experts_fixed_sizes": Setup(k=2, expert=narrow_mlp, settings={"capacity_factor": 4.0}),
    "experts_that_return_a_tuple": Setup(k=2, expert=WithBiasBeside),
    "used_token": Setup(k=1, used_token=True),
    "used_token_capacity": Setup(k=1, drop=True, used_token=True),
    "in_chunks": Setup(k=2, settings={"num_chunks": 3}),
    "padded_to_an_alignment": Setup(k=2, settings={"expert_alignment": 8}),
    "fixed_sizes": Setup(k=2, settings={"capacity_factor": 4.0}),
    "replayed": Setup(k=2, settings=REPLAYED),
    "replayed_zero2": Setup(k=2, stage=2, accumulate=2, evaluate=True, settings=REPLAYED),
    "replayed_checkpointed": Setup(k=2, reentrant=False, stage=1, settings=REPLAYED),
}


def _add(name: str, setup: Setup) -> None:
    def check(group: dist.ProcessGroup) -> None:
        parity(setup)

    check.__name__, check.__module__ = name, __name__
    case(ranks=(2,))(check)


for _name, _setup in MATRIX.items():
    _add(_name, _setup)


@case(ranks=(4,))
def groups_of_three_sizes(group: dist.ProcessGroup) -> None:
    for ep_size in ((1, 4), (4, 2)):
        parity(Setup(k=2, ep_size=ep_size, residual=True, stage=1))


include(
    __name__,
    "tests.distributed.cases_deepspeed_layer",
    "tests.distributed.cases_deepspeed_modules",
    "tests.distributed.cases_deepspeed_copies",
)
if importlib.util.find_spec("transformers") is not None:  # AutoEP is for Hugging Face's models
    include(__name__, "tests.distributed.cases_deepspeed_autoep")
