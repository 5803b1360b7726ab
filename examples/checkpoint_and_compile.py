"""Activation checkpointing and torch.compile around MoE layers, under DDP.

    torchrun --nproc-per-node 2 examples/checkpoint_and_compile.py

Dispatch and combine are operators of known shape: torch.compile gets the whole net in one graph (fullgraph=True), and
checkpointing runs them again in the backward pass. Trains the same net with each and without; the losses are equal.
"""

import os

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.utils.checkpoint import checkpoint

from deepep_moe import TokenDispatcher
from deepep_moe.nn import GroupedExperts, MoELayer, TopKRouter, load_balancing_loss, prepare_ddp

HIDDEN, FFN, EXPERTS, TOPK = 32, 64, 8, 2
TOKENS, STEPS = 256, 5  # tokens of a batch, all ranks together


class Net(nn.Module):
    def __init__(self, dispatcher: TokenDispatcher, checkpointed: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.checkpointed = checkpointed
        router = TopKRouter(HIDDEN, EXPERTS, TOPK, balance_loss=lambda *routing: 0.01 * load_balancing_loss(*routing))
        self.moe = MoELayer(dispatcher, router, GroupedExperts(dispatcher.local_experts, HIDDEN, FFN))
        self.last = nn.Linear(HIDDEN, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        y = checkpoint(self.moe, x, use_reentrant=False) if self.checkpointed else self.moe(x)
        return self.last(x + y)


def batch(step: int, rank: int, world: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """This rank's share of a batch, and what the net has to learn."""
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(TOKENS, HIDDEN, generator=generator)[rank::world].to(device)
    return x, torch.sin(2 * x) * x.roll(1, dims=1)


def train_one(net: nn.Module, device: torch.device) -> list[float]:
    rank, world = dist.get_rank(), dist.get_world_size()
    optimizer = torch.optim.AdamW(net.parameters(), lr=5e-3)
    losses = []
    for step in range(STEPS):
        x, y = batch(step, rank, world, device)
        loss = F.mse_loss(net(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        dist.all_reduce(mean := loss.detach() / world)
        losses.append(mean.item())
    return losses


def train() -> dict[str, list[float]]:
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    dispatcher = TokenDispatcher(None, EXPERTS)
    # Inductor compiles C++ for half a minute on a CPU; "aot_eager" traces the same graph and runs it as it is.
    backend = "inductor" if device.type == "cuda" else "aot_eager"

    results = {}
    for name, checkpointed, compiled in (
        ("eager", False, False),
        ("checkpointed", True, False),
        ("compiled", False, True),
    ):
        net: nn.Module = Net(dispatcher, checkpointed).to(device)
        if compiled:
            net = torch.compile(net, fullgraph=True, backend=backend)
        results[name] = train_one(DDP(prepare_ddp(net)), device)
        if dist.get_rank() == 0:
            print(f"{name}: loss {results[name][0]:.6f} -> {results[name][-1]:.6f}")
    return results


if __name__ == "__main__":
    dist.init_process_group()
    train()
    dist.destroy_process_group()  # when the net is gone: PyTorch may wait forever in the other order
