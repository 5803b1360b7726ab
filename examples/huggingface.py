"""A Hugging Face MoE model, its experts spread over all ranks: Qwen3-MoE here, the same for Mixtral and others.

    torchrun --nproc-per-node 2 examples/huggingface.py

In transformers 5 the experts of a block are two tensors, ``gate_up_proj`` [E, 2 I, H] and ``down_proj`` [E, H, I],
which is the layout of ``GroupedExperts``. So a conversion keeps the router, copies the slices of this rank's experts,
and replaces the block. The converted model is compared with the original, then trained.
"""

import os

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel as DDP
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from deepep_moe import TokenDispatcher
from deepep_moe.nn import GroupedExperts, MoELayer, prepare_ddp

STEPS, SEQUENCES, LENGTH = 20, 8, 16  # sequences of a batch, all ranks together


class Router(nn.Module):
    """The block's own router, with its results in the order of ``deepep_moe.nn.Router``."""

    def __init__(self, gate: nn.Module) -> None:
        super().__init__()
        self.gate = gate

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        _, topk_weights, topk_idx = self.gate(x)
        return topk_idx, topk_weights


@torch.no_grad()
def convert(model: nn.Module, dispatcher: TokenDispatcher) -> nn.Module:
    """Replace the MoE blocks of ``model``, which has the same weights on all ranks."""
    own = dispatcher.local_experts
    for parent in list(model.modules()):
        for name, block in list(parent.named_children()):
            if not hasattr(getattr(block, "experts", None), "gate_up_proj"):
                continue
            more = {child for child, _ in block.named_children()} - {"gate", "experts"}
            if more:
                raise ValueError(f"{type(block).__name__} also has {', '.join(sorted(more))}: convert it by hand")
            gate_up, down = block.experts.gate_up_proj, block.experts.down_proj
            experts = GroupedExperts(
                own, gate_up.shape[2], down.shape[2], activation=block.experts.act_fn, device="meta", dtype=down.dtype
            ).to_empty(device=down.device)
            experts.weight1.copy_(gate_up[own.start : own.stop])
            experts.weight2.copy_(down[own.start : own.stop])
            setattr(parent, name, MoELayer(dispatcher, Router(block.gate), experts))
    return model


def train() -> tuple[float, list[float]]:
    rank, world = dist.get_rank(), dist.get_world_size()
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    config = Qwen3MoeConfig(
        vocab_size=64,
        hidden_size=32,
        moe_intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        num_experts=8,
        num_experts_per_tok=2,
        norm_topk_prob=True,
    )
    torch.manual_seed(0)
    model = Qwen3MoeForCausalLM(config).to(device)
    start = torch.arange(SEQUENCES, device=device)[rank::world, None]
    tokens = (start * 5 + torch.arange(LENGTH, device=device) * 3) % 64  # next = this + 3

    with torch.no_grad():
        expected = model(tokens).logits
        model = convert(model, TokenDispatcher(None, config.num_experts))
        difference = (model(tokens).logits - expected).abs().max()
    dist.all_reduce(difference, op=dist.ReduceOp.MAX)

    net = DDP(prepare_ddp(model))
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
    losses = []
    for _ in range(STEPS):
        loss = net(input_ids=tokens, labels=tokens).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        dist.all_reduce(mean := loss.detach() / world)
        losses.append(mean.item())
    if rank == 0:
        print(f"largest difference of logits to the original model: {difference.item():.1e}")
        print(f"{world} ranks, {config.num_experts // world} experts each: loss {losses[0]:.6f} -> {losses[-1]:.6f}")
    return difference.item(), losses


if __name__ == "__main__":
    dist.init_process_group()
    train()
    dist.destroy_process_group()  # when the net is gone: PyTorch may wait forever in the other order
