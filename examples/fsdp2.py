"""A net with MoE layers under FSDP2. Experts are spread over groups of ranks and sharded over the copies of a group.

    torchrun --nproc-per-node 2 examples/fsdp2.py              # experts spread over both ranks
    torchrun --nproc-per-node 4 examples/fsdp2.py --experts 2  # two groups of two ranks, each with all experts

Everything else is sharded over all ranks. The losses do not depend on the numbers of ranks and groups.
"""

import argparse
import gc
import os

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from deepep_moe import TokenDispatcher
from deepep_moe.nn import (
    GroupedExperts,
    MoELayer,
    TopKRouter,
    clip_grad_norm_,
    expert_parameters,
    fully_shard_experts,
)

HIDDEN, FFN, EXPERTS, TOPK = 32, 64, 8, 2
TOKENS, STEPS = 256, 25  # tokens of a batch, all ranks together


class Block(nn.Module):
    def __init__(self, dispatcher: TokenDispatcher) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(HIDDEN)
        experts = GroupedExperts(dispatcher.local_experts, HIDDEN, FFN)
        self.moe = MoELayer(dispatcher, TopKRouter(HIDDEN, EXPERTS, TOPK), experts)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.moe(self.norm(x))


def batch(step: int, rank: int, world: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """This rank's share of a batch, and what the net has to learn."""
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(TOKENS, HIDDEN, generator=generator)[rank::world].to(device)
    return x, torch.sin(2 * x) * x.roll(1, dims=1)


def train(expert_ranks: int = 0) -> list[float]:
    rank, world = dist.get_rank(), dist.get_world_size()
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    expert_ranks = expert_ranks or world
    mesh = init_device_mesh(device.type, (world // expert_ranks, expert_ranks), mesh_dim_names=("replicas", "experts"))

    torch.manual_seed(0)
    dispatcher = TokenDispatcher(mesh["experts"], EXPERTS)
    net = nn.Sequential(Block(dispatcher), Block(dispatcher), nn.Linear(HIDDEN, HIDDEN)).to(device)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16) if device.type == "cuda" else MixedPrecisionPolicy()
    fully_shard_experts(net, mesh["replicas"], mp_policy=policy)
    for block in net:
        fully_shard(block, mp_policy=policy)
    fully_shard(net, mp_policy=policy)

    # The two kinds of parameters are sharded over different ranks, so the optimizer gets them as two groups.
    experts = expert_parameters(net)
    dense = [p for p in net.parameters() if not any(p is expert for expert in experts)]
    optimizer = torch.optim.AdamW([{"params": dense}, {"params": experts}], lr=5e-3)

    losses = []
    for step in range(STEPS):
        x, y = batch(step, rank, world, device)
        loss = F.mse_loss(net(x).float(), y)
        optimizer.zero_grad()
        loss.backward()
        clip_grad_norm_(net, max_norm=1.0)
        optimizer.step()
        dist.all_reduce(mean := loss.detach() / world)
        losses.append(mean.item())
    if rank == 0:
        print(f"{world} ranks, {EXPERTS // expert_ranks} experts each: loss {losses[0]:.6f} -> {losses[-1]:.6f}")
    return losses


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="An MoE net under FSDP2.")
    parser.add_argument("--experts", type=int, default=0, help="ranks that share the experts; default: all")
    dist.init_process_group()
    train(parser.parse_args().experts)
    gc.collect()  # FSDP's modules refer to each other: they are freed only here
    dist.destroy_process_group()  # when the net is gone: PyTorch may wait forever in the other order
