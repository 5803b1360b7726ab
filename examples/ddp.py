"""A net with MoE layers under DistributedDataParallel. The experts are spread over all ranks, the rest is replicated.

    torchrun --nproc-per-node 2 examples/ddp.py

The losses do not depend on the number of ranks: the gradients are those of the whole batch.
"""

import os

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel as DDP

from deepep_moe import TokenDispatcher
from deepep_moe.nn import GroupedExperts, MoELayer, TopKRouter, clip_grad_norm_, prepare_ddp

HIDDEN, FFN, EXPERTS, TOPK = 32, 64, 8, 2
TOKENS, STEPS = 256, 25  # tokens of a batch, all ranks together


class Block(nn.Module):
    def __init__(self, dispatcher: TokenDispatcher) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(HIDDEN)
        router = TopKRouter(HIDDEN, EXPERTS, TOPK)
        experts = GroupedExperts(dispatcher.local_experts, HIDDEN, FFN)
        self.moe = MoELayer(dispatcher, router, experts, shared_expert=nn.Linear(HIDDEN, HIDDEN))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.moe(self.norm(x))


def batch(step: int, rank: int, world: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """This rank's share of a batch, and what the net has to learn."""
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(TOKENS, HIDDEN, generator=generator)[rank::world].to(device)
    return x, torch.sin(2 * x) * x.roll(1, dims=1)


def train() -> list[float]:
    rank, world = dist.get_rank(), dist.get_world_size()
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)

    torch.manual_seed(0)  # the same on all ranks; GroupedExperts draws other values for each expert
    dispatcher = TokenDispatcher(None, EXPERTS)
    net = DDP(prepare_ddp(nn.Sequential(Block(dispatcher), Block(dispatcher), nn.Linear(HIDDEN, HIDDEN)).to(device)))
    optimizer = torch.optim.AdamW(net.parameters(), lr=5e-3)

    losses = []
    for step in range(STEPS):
        x, y = batch(step, rank, world, device)
        loss = F.mse_loss(net(x), y)
        optimizer.zero_grad()
        loss.backward()
        clip_grad_norm_(net, max_norm=1.0)
        optimizer.step()
        dist.all_reduce(mean := loss.detach() / world)
        losses.append(mean.item())
    if rank == 0:
        print(f"{world} ranks, {EXPERTS // world} experts each: loss {losses[0]:.6f} -> {losses[-1]:.6f}")
    return losses


if __name__ == "__main__":
    dist.init_process_group()
    train()
    dist.destroy_process_group()  # when the net is gone: PyTorch may wait forever in the other order
