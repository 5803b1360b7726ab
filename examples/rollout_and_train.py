"""Reinforcement learning with one MoE policy: rollouts by the low-latency decoder, training by the dispatcher.

    torchrun --nproc-per-node 2 examples/rollout_and_train.py

Both use the same weights in one process: nothing is copied to an inference engine. The decoder
has fixed shapes and no host wait (docs/decode.md): on GPUs a rollout step can be captured in a CUDA graph.
The task: for each of 16 states, learn which of 4 actions is rewarded.
"""

import os

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel as DDP

from deepep_moe import TokenDispatcher
from deepep_moe.nn import GroupedExperts, MoELayer, TopKRouter, prepare_ddp

HIDDEN, FFN, EXPERTS, TOPK, STATES, ACTIONS = 32, 32, 8, 2, 16, 4
EPISODES, STEPS = 64, 40  # episodes of a rank in each step


class PolicyLayer(MoELayer):
    """Takes the decoder where no gradients are computed."""

    def __init__(self, dispatcher: TokenDispatcher) -> None:
        experts = GroupedExperts(dispatcher.local_experts, HIDDEN, FFN)
        super().__init__(dispatcher, TopKRouter(HIDDEN, EXPERTS, TOPK), experts)
        self.decoder = dispatcher.decoder(max_tokens_per_rank=EPISODES)

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            return super().forward(x)
        topk_idx, topk_weights = self.router(x)
        sent = self.decoder.dispatch(x.bfloat16(), topk_idx)  # sent.rows [L, R * M, H]
        weight1, weight2 = self.experts.weight1.bfloat16(), self.experts.weight2.bfloat16()
        gate, up = torch.bmm(sent.rows, weight1.mT).chunk(2, dim=-1)
        y = torch.bmm(F.silu(gate) * up, weight2.mT)
        return self.decoder.combine(y, sent, topk_weights).to(x.dtype)


class Policy(nn.Module):
    def __init__(self, dispatcher: TokenDispatcher) -> None:
        super().__init__()
        self.state = nn.Embedding(STATES, HIDDEN)
        self.moe = PolicyLayer(dispatcher)
        self.action = nn.Linear(HIDDEN, ACTIONS)

    def forward(self, states: Tensor) -> Tensor:
        """Logarithms of the probabilities of actions, [T, ACTIONS], for states [T]."""
        x = self.state(states)
        return self.action(x + self.moe(x)).log_softmax(-1)


def train() -> tuple[list[float], float]:
    rank, world = dist.get_rank(), dist.get_world_size()
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    torch.manual_seed(0)
    policy = Policy(TokenDispatcher(None, EXPERTS)).to(device)
    net = DDP(prepare_ddp(policy))
    optimizer = torch.optim.Adam(net.parameters(), lr=5e-3)
    torch.manual_seed(rank + 1)  # other episodes on each rank

    rewards, largest = [], 0.0
    for _ in range(STEPS):
        states = torch.randint(STATES, (EPISODES,), device=device)
        with torch.no_grad():  # rollout
            old = policy(states)
            actions = torch.multinomial(old.exp(), 1)
            reward = (actions.squeeze(1) == states * 7 % ACTIONS).float()

        new = net(states)  # training
        loss = -(new.gather(1, actions).squeeze(1) * (reward - reward.mean())).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

        dist.all_reduce(mean := reward.mean() / world)
        dist.all_reduce(apart := (new - old).detach().abs().max(), op=dist.ReduceOp.MAX)
        rewards.append(mean.item())
        largest = max(largest, apart.item())
    if rank == 0:
        print(f"{world} ranks: mean reward {rewards[0]:.3f} -> {rewards[-1]:.3f}")
        print(f"log probabilities of rollout (BF16) and training differ by at most {largest:.3f}")
    return rewards, largest


if __name__ == "__main__":
    dist.init_process_group()
    train()
    dist.destroy_process_group()  # when the net is gone: PyTorch may wait forever in the other order
