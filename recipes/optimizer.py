"""AdamW with fp32 master weights: gradients summed over replicas, clipped, and applied to each rank's share.

It is not torch.optim.AdamW, because that needs gradients in the dtype of the weights: with BF16 parameters, converting
them, its own passes and the copy back take twice as long as the one kernel here (docs/benchmarks.md).

Ranks that hold copies of a parameter divide its update among themselves (ZeRO stage 1): each gets the summed gradient
of its share, updates it, and sends the new values to the others. That moves as many bytes as an all-reduce, and each
rank keeps only its share of the optimizer state.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Parameter

BETA1, BETA2, EPSILON = 0.9, 0.95, 1e-8

SMALL = 1 << 18
"""Elements of a parameter below which its replicas all update the whole of it, their gradients summed in one call."""


def adamw(
    master: Tensor, moment1: Tensor, moment2: Tensor, gradient: Tensor, copy: Tensor | None, hyper: Tensor
) -> None:
    """One update in place. On a GPU it is compiled into one kernel, which reads and writes each tensor once.

    Args:
        master, moment1, moment2: [N] fp32.
        gradient: [N] in any floating dtype.
        copy: [N], set to the new ``master`` in its own dtype; None if there is no such copy.
        hyper: [5] fp32 on the same device: factor of the gradient, learning rate, weight decay, and the bias
            corrections of both moments.
    """
    factor, rate, decay, correction1, correction2 = hyper.unbind()
    scaled = gradient.float() * factor
    moment1.lerp_(scaled, 1 - BETA1)
    moment2.lerp_(scaled * scaled, 1 - BETA2)
    change = (moment1 / correction1) / ((moment2 / correction2).sqrt() + EPSILON)
    master.mul_(1 - rate * decay).sub_(rate * change)
    if copy is not None:
        copy.copy_(master)


@dataclass
class _Share:
    """What this rank updates of one parameter."""

    parameter: Parameter
    group: dist.ProcessGroup | None  # ranks with a copy of the parameter; None: this one only
    divided: bool  # among them; else each updates the whole parameter
    values: Tensor  # [N], a view of the parameter
    master: Tensor  # [N] fp32; ``values`` itself if the parameter is fp32
    moment1: Tensor
    moment2: Tensor

    @property
    def copy(self) -> Tensor | None:
        return None if self.master is self.values else self.values


class Adam:
    """AdamW for parameters of which some have copies on other ranks.

    The learning rate rises over ``warmup`` steps and falls to a tenth along a cosine. Weights of one dimension do not
    decay.

    Args:
        parameters: contiguous, on one device.
        replicas: the ranks that hold a copy of a parameter, this one included.
        learning_rate, weight_decay: as for ``torch.optim.AdamW``; the rate is the highest of the schedule.
        clip: the largest norm of the whole gradient; larger ones are scaled down to it. 0: gradients are not clipped.
        warmup, steps: lengths of the rise and of the whole schedule.
    """

    def __init__(
        self,
        parameters: Iterable[Parameter],
        replicas: Callable[[Tensor], dist.ProcessGroup | None],
        *,
        learning_rate: float,
        weight_decay: float,
        clip: float,
        warmup: int,
        steps: int,
    ) -> None:
        self.learning_rate, self.clip = learning_rate, clip
        self.warmup, self.steps, self.updates = warmup, steps, 0
        self._decays = (0.0, weight_decay)
        self.shares = [self._share(parameter, replicas(parameter)) for parameter in parameters]
        # Divided ones first, because their new values are sent while the others are updated; then large ones first.
        self.shares.sort(key=lambda share: (not share.divided, -share.values.numel()))
        copies = [1 if share.divided or share.group is None else share.group.size() for share in self.shares]
        device = self.shares[0].values.device
        self._copies = torch.tensor(copies, dtype=torch.float32, device=device)  # ranks that count it in the norm
        self._scalars = [torch.zeros(4, dtype=torch.float32, device=device) for _ in self._decays]  # of one update
        self._update = torch.compile(adamw, dynamic=True) if device.type == "cuda" else adamw

    @staticmethod
    def _share(parameter: Parameter, group: dist.ProcessGroup | None) -> _Share:
        size = 1 if group is None else group.size()
        flat = parameter.detach().view(-1)
        divided = size > 1 and flat.numel() >= SMALL and flat.numel() % size == 0
        values = flat.chunk(size)[dist.get_rank(group)] if divided else flat
        master = values if values.dtype == torch.float32 else values.float()
        moment1, moment2 = (torch.zeros_like(values, dtype=torch.float32) for _ in range(2))
        return _Share(parameter, group if size > 1 else None, divided, values, master, moment1, moment2)

    def step(self, step: int) -> Tensor:
        """Update the parameters from their gradients. Collective; nothing waits for the device.

        Args:
            step: place in the schedule, from 0.

        Returns:
            The norm of the whole gradient before it is clipped, 0-dim fp32, the same on every rank.
        """
        self.prepare(step)
        return self.update()

    def prepare(self, step: int) -> None:
        """The part of :meth:`step` that differs from step to step: its numbers are sent to the device."""
        self.updates += 1
        for decay, scalars in zip(self._decays, self._scalars):
            values = [self.rate(step), decay, 1 - BETA1**self.updates, 1 - BETA2**self.updates]
            sent = torch.tensor(values, dtype=torch.float32, device="cpu", pin_memory=scalars.is_cuda)
            scalars.copy_(sent, non_blocking=True)

    @torch.no_grad()
    def update(self) -> Tensor:
        """The rest of :meth:`step`; it can be captured in a CUDA graph, with gradients that stay where they are."""
        gradients = self.sum_gradients()
        norm = self.norm(gradients)
        factor = (self.clip / (norm + 1e-6)).clamp(max=1.0) if self.clip else torch.ones_like(norm)
        hyper = [torch.cat([factor.view(1), scalars]) for scalars in self._scalars]
        pending = []
        for share, gradient in zip(self.shares, gradients):
            decays = share.parameter.dim() >= 2
            self._update(share.master, share.moment1, share.moment2, gradient, share.copy, hyper[decays])
            if share.divided:
                whole = share.parameter.detach().view(-1)
                pending.append(dist.all_gather_into_tensor(whole, share.values, group=share.group, async_op=True))
        for work in pending:
            work.wait()
        return norm

    def sum_gradients(self) -> list[Tensor]:
        """Each share's gradient [N], summed over the copies of the parameter.

        An expert's gradient already holds what all ranks of its expert-parallel group sent to it (the backward of
        dispatch and combine brought it), so it is summed over the other copies of the expert only.
        """
        pending, gradients = [], []
        small: dict[tuple[dist.ProcessGroup, torch.dtype], list[Tensor]] = {}
        for share in self.shares:
            parameter = share.parameter
            if parameter.grad is None:  # an expert that no token chose: its peers wait for the sum all the same
                parameter.grad = torch.zeros_like(parameter)
            gradient = parameter.grad.view(-1)
            if share.divided:
                own = torch.empty_like(share.values)
                pending.append(dist.reduce_scatter_tensor(own, gradient, group=share.group, async_op=True))
                gradient = own
            elif share.group is not None:
                small.setdefault((share.group, gradient.dtype), []).append(gradient)
            gradients.append(gradient)
        for (group, _), parts in small.items():
            together = torch.cat(parts)
            dist.all_reduce(together, group=group)
            for part, total in zip(parts, together.split([part.numel() for part in parts])):
                part.copy_(total)
        for work in pending:
            work.wait()
        return gradients

    def norm(self, gradients: list[Tensor]) -> Tensor:
        """2-norm of the whole gradient, all experts included, from the shares of all ranks. Collective."""
        squares = torch.stack(torch._foreach_norm(gradients, 2, torch.float32)).square()
        total = (squares / self._copies).sum()
        if dist.is_initialized():
            dist.all_reduce(total)
        return total.sqrt()

    def rate(self, step: int) -> float:
        """The learning rate of a step."""
        if step < self.warmup:
            return self.learning_rate * (step + 1) / self.warmup
        progress = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.learning_rate * (0.55 + 0.45 * math.cos(math.pi * min(1.0, progress)))

    def state_dict(self) -> dict[str, Any]:
        """This rank's shares; masters only of parameters that are not fp32 themselves."""
        return {
            "updates": self.updates,
            "shares": [
                {"moment1": share.moment1, "moment2": share.moment2}
                | ({} if share.copy is None else {"master": share.master})
                for share in self.shares
            ],
        }

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Raises ValueError if ``state`` is that of parameters in another dtype or of other ranks."""
        own = self.state_dict()["shares"]
        if [saved.keys() for saved in state["shares"]] != [saved.keys() for saved in own]:
            raise ValueError("the optimizer's state was written for parameters in another dtype")
        self.updates = state["updates"]
        for share, saved in zip(self.shares, state["shares"], strict=True):
            for name, values in saved.items():
                getattr(share, name).copy_(values)
