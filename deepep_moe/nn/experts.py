"""The experts of one rank as one module: :class:`GroupedExperts`."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deepep_moe.backends.checks import check_integer, check_tensor
from deepep_moe.errors import InputError
from deepep_moe.grouped import Groups, grouped_mlp
from deepep_moe.row_scaling import scale_rows

_SEEDS = 2**62


class GroupedExperts(nn.Module):
    """L gated MLPs, each applied to its own rows: ``(silu(x @ gate.T) * (x @ up.T)) @ down.T``, without biases.

    The parameters have the layout of the experts in Hugging Face transformers 5 (``gate_up_proj``, ``down_proj``):

    * ``weight1`` [L, 2 I, H]: the I rows of gate, then the I rows of up; [L, I, H] without a gate.
    * ``weight2`` [L, H, I]: down.

    Initial values are drawn as ``torch.nn.Linear`` draws them, for each expert from the global seed and its index. So
    with equal seeds on all ranks, experts differ from each other, and a layer starts with the same values whatever the
    number of ranks that its experts are spread over (on one type of device).

    Args:
        experts: indices of this rank's experts (``TokenDispatcher.local_experts``), or their number: ``range(number)``.
        hidden_size: H.
        ffn_size: I.
        activation: elementwise; of the gate, or of the only projection without a gate.
        gated: whether there is a gate.
        recompute_activation: compute the activation again in the backward pass instead of storing it.
        device, dtype: of the parameters; default: PyTorch's defaults, as for ``torch.nn.Linear``.

    Raises:
        InputError: no experts, or a size below 1.
    """

    def __init__(
        self,
        experts: range | int,
        hidden_size: int,
        ffn_size: int,
        *,
        activation: Callable[[Tensor], Tensor] = F.silu,
        gated: bool = True,
        recompute_activation: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(experts, range):
            check_integer("experts", experts, least=1)
            experts = range(experts)
        check_integer("len(experts)", len(experts), least=1)
        check_integer("hidden_size", hidden_size, least=1)
        check_integer("ffn_size", ffn_size, least=1)
        if not callable(activation):
            raise InputError("activation", repr(activation), "must be a function of a tensor")
        self.experts = experts
        self.activation, self.gated, self.recompute_activation = activation, gated, recompute_activation
        rows = 2 * ffn_size if gated else ffn_size
        self.weight1 = nn.Parameter(torch.empty(len(experts), rows, hidden_size, device=device, dtype=dtype))
        self.weight2 = nn.Parameter(torch.empty(len(experts), hidden_size, ffn_size, device=device, dtype=dtype))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw new initial values; does nothing on the device "meta"."""
        seed = int(torch.randint(_SEEDS, (), dtype=torch.int64, device="cpu"))
        if self.weight1.is_meta:
            return
        generator = torch.Generator(device=self.weight1.device)
        for index, first, second in zip(self.experts, self.weight1, self.weight2):
            generator.manual_seed((seed + index) % _SEEDS)
            for matrix in (first, second):
                bound = matrix.shape[1] ** -0.5
                matrix.uniform_(-bound, bound, generator=generator)

    def forward(self, rows: Tensor, tokens_per_expert: Tensor, row_weights: Tensor | None = None) -> Tensor:
        """Apply each expert to its rows.

        Args:
            rows: [M, H] in expert order (``Dispatched.rows``); in the dtype of the parameters, unless autocast is on.
            tokens_per_expert: [L] integers on any device: rows of each expert. On the CPU it saves a wait for the GPU.
                Rows beyond their sum are padding.
            row_weights: [M] routing weights that scale the input of the last projection; None: the rows are not scaled.

        Returns:
            [M, H] in the dtype of the rows; under autocast in autocast's dtype. Padding rows are undefined.

        Raises:
            InputError: another shape, dtype or device, or impossible counts (which are looked at on a CPU only).
        """
        weight = self.weight1
        if not torch.compiler.is_compiling():  # which does not know numbers of rows
            check_tensor("rows", rows)
            if rows.dim() != 2 or rows.shape[1] != weight.shape[2]:
                raise InputError("rows", f"shape {tuple(rows.shape)}", f"must be [M, {weight.shape[2]}]")
            if rows.device != weight.device:
                raise InputError("rows", rows.device, f"must be on {weight.device}, the device of the experts")
            if rows.dtype != weight.dtype and not torch.is_autocast_enabled(weight.device.type):
                raise InputError("rows", rows.dtype, f"must be {weight.dtype}, the dtype of the experts' weights")
            check_tensor("tokens_per_expert", tokens_per_expert)
            if tokens_per_expert.shape != (len(self.experts),) or tokens_per_expert.is_floating_point():
                raise InputError(
                    "tokens_per_expert",
                    f"{tokens_per_expert.dtype} of shape {tuple(tokens_per_expert.shape)}",
                    f"must be integers of shape ({len(self.experts)},), one for each expert of this rank",
                )
            if tokens_per_expert.device.type == "cpu":
                least, total = int(tokens_per_expert.min()), int(tokens_per_expert.sum())
                if least < 0:
                    raise InputError("tokens_per_expert", least, "must not be negative")
                if total > rows.shape[0]:
                    raise InputError(
                        "tokens_per_expert", f"{total} rows", f"must be at most the {rows.shape[0]} of rows"
                    )
        return grouped_mlp(
            rows,
            weight,
            self.weight2,
            Groups(tokens_per_expert),
            self._activate,
            row_weights,
            recompute_activation=self.recompute_activation,
        )

    def _activate(self, hidden: Tensor, row_weights: Tensor | None) -> Tensor:
        if self.gated:
            gate, up = hidden.chunk(2, dim=-1)
            activated = self.activation(gate) * up
        else:
            activated = self.activation(hidden)
        return activated if row_weights is None else scale_rows(activated, row_weights)

    def extra_repr(self) -> str:
        local, _, hidden = self.weight1.shape
        gate = "" if self.gated else ", gated=False"
        name = getattr(self.activation, "__name__", type(self.activation).__name__)
        return (
            f"experts {self.experts[0]} to {self.experts[-1]} ({local}), hidden_size={hidden}, "
            f"ffn_size={self.weight2.shape[2]}, activation={name}{gate}"
        )
