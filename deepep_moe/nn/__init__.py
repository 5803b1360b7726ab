"""An MoE layer for plain PyTorch, with its experts spread over the ranks of a group.

Build a layer from four parts, each of which can be replaced::

    dispatcher = TokenDispatcher(None, num_experts=64)
    layer = MoELayer(
        dispatcher,
        TopKRouter(hidden_size, num_experts=64, topk=8),
        GroupedExperts(dispatcher.local_experts, hidden_size, ffn_size),
        shared_expert=None,
    )
    y = layer(x)  # [..., hidden_size]

The experts of different ranks are different parameters, which data parallelism must not average or shard together:

* DDP: ``net = DDP(prepare_ddp(net))``
* FSDP2: ``fully_shard_experts(net)``, then ``fully_shard(net)``
* gradient clipping: :func:`clip_grad_norm_` of this package

:class:`MoELayer` raises an error in its first forward pass if DDP or FSDP2 is used without these.
"""

from deepep_moe.nn.experts import GroupedExperts
from deepep_moe.nn.layer import MoELayer
from deepep_moe.nn.parallel import (
    ExpertParallel,
    average_expert_gradients,
    clip_grad_norm_,
    expert_parameters,
    fully_shard_experts,
    prepare_ddp,
)
from deepep_moe.nn.router import Router, TopKRouter, load_balancing_loss

__all__ = [
    "ExpertParallel",
    "GroupedExperts",
    "MoELayer",
    "Router",
    "TopKRouter",
    "average_expert_gradients",
    "clip_grad_norm_",
    "expert_parameters",
    "fully_shard_experts",
    "load_balancing_loss",
    "prepare_ddp",
]
