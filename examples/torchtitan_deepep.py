"""torchtitan's own DeepEP code, unchanged, on this library: ``deepep_moe.compat`` serves its ``import deep_ep``.

    pip install torchtitan
    torchrun --nproc-per-node 2 examples/torchtitan_deepep.py

In a training run the first two lines below come before torchtitan is imported, and the model's configuration says
``moe_comm_backend="deepep"``. This file calls torchtitan's dispatch and combine directly, and compares outputs and
gradients with those of ``deepep_moe.nn.MoELayer``. Tested with torchtitan 0.3.0.
"""

import deepep_moe.compat

deepep_moe.compat.install()

import os  # noqa: E402

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from torch import Tensor  # noqa: E402
from torchtitan.distributed.deepep import deepep as titan  # noqa: E402

from deepep_moe import TokenDispatcher  # noqa: E402
from deepep_moe.nn import GroupedExperts, MoELayer, TopKRouter  # noqa: E402

HIDDEN, FFN, EXPERTS, TOPK, TOKENS = 128, 64, 8, 2, 64


def titan_layer(layer: MoELayer, x: Tensor) -> Tensor:
    """The same layer by torchtitan's dispatch and combine."""
    topk_idx, topk_weights = layer.router(x)
    local = len(layer.dispatcher.local_experts)
    rows, counts, state = titan.dispatch_tokens(x, topk_idx, topk_weights, local, EXPERTS, num_tokens_per_rank=TOKENS)
    out = titan.combine_tokens(layer.experts(rows, counts), state)
    titan.sync_combine()
    return out


def compare() -> tuple[float, float]:
    rank = dist.get_rank()
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    else:  # torchtitan registers its operators for GPUs only; ours run on CPUs as well
        torch.library.impl("deepep::dispatch", "CPU")(titan._dispatch_op_impl)
        torch.library.impl("deepep::combine", "CPU")(titan._combine_op_impl)
    dtype = torch.bfloat16
    torch.manual_seed(0)
    dispatcher = TokenDispatcher(None, EXPERTS)
    layer = MoELayer(
        dispatcher,
        TopKRouter(HIDDEN, EXPERTS, TOPK, device=device, dtype=dtype),
        GroupedExperts(dispatcher.local_experts, HIDDEN, FFN, device=device, dtype=dtype),
    )
    titan.get_buffer(dispatcher.backend.group, hidden=HIDDEN, num_max_tokens_per_rank=TOKENS, num_topk=TOPK)

    results = []
    for forward in (layer, lambda x: titan_layer(layer, x)):
        generator = torch.Generator().manual_seed(rank)
        x = torch.randn(TOKENS, HIDDEN, generator=generator).to(device, dtype).requires_grad_()
        layer.zero_grad()
        out = forward(x)
        out.float().square().mean().backward()
        results.append([out.detach(), x.grad, *(p.grad.clone() for p in layer.parameters())])

    def apart(a: Tensor, b: Tensor) -> float:
        return ((a.float() - b.float()).norm() / b.float().norm()).item()

    errors = torch.tensor([apart(ours, theirs) for ours, theirs in zip(*results, strict=True)], device=device)
    dist.all_reduce(errors, op=dist.ReduceOp.MAX)
    if rank == 0:
        print(f"relative difference to torchtitan's layer: output {errors[0]:.4f}, gradients {errors[1:].max():.4f}")
    return errors[0].item(), errors[1:].max().item()


if __name__ == "__main__":
    dist.init_process_group()
    compare()
    dist.destroy_process_group()
