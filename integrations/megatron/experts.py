"""Experts in one module with two weights, for Megatron-Core without TransformerEngine or extra packages.

The computation is :func:`deepep_moe.grouped.grouped_mlp`, as in :class:`deepep_moe.nn.GroupedExperts`; this class adds
Megatron-Core's options, initialisation and checkpoint format.

Use it in a layer specification, or let the plugin replace Megatron-Core's own local experts::

    submodules = MoESubmodules(experts=GroupedExperts, ...)
    deepep_moe.integrations.megatron.register(grouped_experts=True)       # or the launcher's --grouped-experts

Initial weights are those of ``SequentialMLP`` for the same seed, and sharded checkpoints of the two can be loaded
into each other, also with another number of expert- or tensor-parallel ranks. (Optimizer state cannot.)
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.dist_checkpointing.mapping import ReplicaId, ShardedTensor, ShardedTensorFactory
from megatron.core.fusions.fused_bias_swiglu import weighted_bias_swiglu_impl
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker, get_expert_parallel_rng_tracker_name
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.utils import ensure_metadata_has_dp_cp_group, make_sharded_tensors_for_checkpoint
from torch import Tensor
from torch.nn import Parameter

from deepep_moe.errors import ConfigError, UnsupportedError
from deepep_moe.grouped import Groups, grouped_mlp
from deepep_moe.row_scaling import scale_rows

_EXTRA_STATE = "_extra_state"


class GroupedExperts(MegatronModule):
    """The L local experts of a ``MoELayer``: ``weight1 [L, O, H]`` and ``weight2 [L, H, I]``.

    With expert tensor parallelism I is a slice of ``moe_ffn_hidden_size``; O is I, or 2 I with gated linear units
    (first the gates, then the values). H is ``moe_latent_size`` if that is set.

    Args:
        num_local_experts: L.
        config: ``TransformerConfig``; no biases, FP8 or FP4.
        submodules: ignored, so that the class fits where a specification had other experts.
        pg_collection: process groups; ``ep``, ``expt_tp`` and ``expt_dp`` are used.
        name: ignored (given by 0.18 and newer).

    Raises:
        ConfigError: an option that these experts do not have.
    """

    def __init__(
        self, num_local_experts: int, config: Any, submodules: Any = None, pg_collection: Any = None, name: Any = None
    ) -> None:
        super().__init__(config=config)
        _check_options(config)
        self.num_local_experts = num_local_experts
        self.ep_group, self.tp_group, self.dp_group = pg_collection.ep, pg_collection.expt_tp, pg_collection.expt_dp
        tp_size = self.tp_group.size()
        if config.moe_ffn_hidden_size % tp_size:
            raise ConfigError(
                f"moe_ffn_hidden_size = {config.moe_ffn_hidden_size} (TransformerConfig): "
                f"must be a multiple of expert_tensor_parallel_size = {tp_size}"
            )
        self.register_load_state_dict_pre_hook(_drop_extra_states)
        self.activation_recompute = (
            config.recompute_granularity == "selective" and "moe_act" in config.recompute_modules
        )
        hidden = config.moe_latent_size or config.hidden_size
        inner = config.moe_ffn_hidden_size // tp_size
        # With tensor parallelism weight1 holds a slice of the gates and the same slice of the values.
        pieces = 2 if config.gated_linear_unit else 1
        self.weight1 = self._parameter(pieces * inner, hidden, sharded_dim=0, pieces=pieces)
        self.weight2 = self._parameter(hidden, inner, sharded_dim=1)
        if config.perform_initialization:
            for first, second in zip(self.weight1, self.weight2):
                self._initialize(first, config.init_method, sharded_dim=0, pieces=pieces)
                self._initialize(second, config.output_layer_init_method, sharded_dim=1)

    def _parameter(self, rows: int, columns: int, sharded_dim: int, pieces: int = 1) -> Parameter:
        device = torch.device("cpu") if self.config.use_cpu_initialization else torch.cuda.current_device()
        shape = (self.num_local_experts, rows, columns)
        weight = Parameter(torch.empty(shape, dtype=self.config.params_dtype, device=device))
        # Megatron's gradient reduction and norm clipping read this attribute of expert weights.
        expert_parallel = self.config.expert_model_parallel_size > 1
        weight.allreduce = not expert_parallel  # type: ignore[attr-defined]
        set_tensor_model_parallel_attributes(weight, is_parallel=True, dim=sharded_dim + 1, stride=pieces)
        return weight

    @torch.no_grad()
    def _initialize(self, weight: Tensor, method: Callable[[Tensor], Any], sharded_dim: int, pieces: int = 1) -> None:
        """Fill one expert's matrix as Megatron-Core's linear layers do, so that seeds mean the same."""
        if not self.config.use_cpu_initialization:
            with get_cuda_rng_tracker().fork(get_expert_parallel_rng_tracker_name()):
                method(weight)
            return
        # On a CPU all ranks draw the whole matrix and keep their slice.
        rank, size = self.tp_group.rank(), self.tp_group.size()
        shape = list(weight.shape)
        shape[sharded_dim] *= size
        whole = torch.empty(shape, dtype=torch.float32, device="cpu")
        method(whole)
        weight.copy_(torch.cat(whole.chunk(pieces * size, dim=sharded_dim)[rank::size], dim=sharded_dim))

    def forward(self, rows: Tensor, tokens_per_expert: Tensor, probs: Tensor) -> tuple[Tensor, None]:
        """Apply each expert to its rows.

        Args:
            rows: ``[M, H]`` in expert order.
            tokens_per_expert: ``[L]`` integers, summing to M.
            probs: ``[M]`` routing probabilities; they scale the activations.

        Returns:
            ``[M, H]``, and None for the bias that there is not.
        """
        if self.config.moe_apply_probs_on_input:
            rows = scale_rows(rows, probs)
            probs = torch.ones_like(probs)
        output = grouped_mlp(
            rows,
            self.weight1,
            self.weight2,
            Groups(tokens_per_expert),
            self._activate,
            probs,
            recompute_activation=self.activation_recompute,
        )
        return output, None

    def _activate(self, hidden: Tensor, probs: Tensor | None) -> Tensor:
        """Activation, gate and routing probability."""
        assert probs is not None
        config = self.config
        if config.bias_activation_fusion and config.gated_linear_unit and config.activation_func is F.silu:
            return weighted_bias_swiglu_impl(hidden, None, probs[:, None], config.activation_func_fp8_input_store)
        if config.gated_linear_unit:
            gate, value = hidden.chunk(2, dim=-1)
            if config.activation_func_clamp_value is not None:
                gate = gate.clamp(max=config.activation_func_clamp_value)
                value = value.clamp(-config.activation_func_clamp_value, config.activation_func_clamp_value)
            if config.glu_linear_offset != 0:  # adding 0 would still be a pass over all rows
                value = value + config.glu_linear_offset
            activated = config.activation_func(gate) * value
        else:
            activated = config.activation_func(hidden)
        return scale_rows(activated, probs)

    def backward_dw(self) -> None:
        """Does nothing: weight gradients come with the backward pass (``delay_wgrad_compute`` is refused)."""

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """One global tensor per matrix, with an axis of all experts: the layout of ``SequentialMLP``."""
        metadata = ensure_metadata_has_dp_cp_group(metadata)
        separate = bool(metadata.get("singleton_local_shards", False))
        gated = self.config.gated_linear_unit
        state: dict[str, Any] = {
            f"{prefix}weight1": self._factory(prefix, "linear_fc1", self.weight1, 0, gated, sharded_offsets, separate),
            f"{prefix}weight2": self._factory(prefix, "linear_fc2", self.weight2, 1, False, sharded_offsets, separate),
        }
        # Megatron's linear layers store an empty object beside each weight and expect it when they load.
        for index, layer in itertools.product(range(self.num_local_experts), ("linear_fc1", "linear_fc2")):
            key, offsets = self._expert_key(prefix, layer, index, sharded_offsets, separate)
            empty = make_sharded_tensors_for_checkpoint(
                {_EXTRA_STATE: None},
                key,
                sharded_offsets=offsets,
                tp_group=self.tp_group,
                dp_cp_group=metadata["dp_cp_group"],
            )[key + _EXTRA_STATE]
            empty.replica_id = (*empty.replica_id[:2], self.dp_group.rank())
            state[f"{prefix}{index}.{layer}.{_EXTRA_STATE}"] = empty
        return state

    def _expert_key(
        self, prefix: str, layer: str, index: int, offsets: tuple[Any, ...], separate: bool
    ) -> tuple[str, tuple[Any, ...]]:
        """Key and offsets of a stored expert: a key of its own, or its index on the axis of all experts."""
        expert = self.ep_group.rank() * self.num_local_experts + index
        if separate:
            return f"{prefix}experts.{expert}.{layer}.", offsets
        total = self.ep_group.size() * self.num_local_experts
        return f"{prefix}experts.{layer}.", (*offsets, (len(offsets), expert, total))

    def _factory(
        self, prefix: str, layer: str, weight: Tensor, dim: int, gated: bool, offsets: tuple[Any, ...], separate: bool
    ) -> ShardedTensorFactory:
        """Saves the experts of ``weight`` one by one (gates and values apart), and stacks what is loaded.

        ``dim`` is the axis that expert tensor parallelism cuts; ``separate`` stores each expert under its own key.
        """
        tp_rank, tp_size = self.tp_group.rank(), self.tp_group.size()

        def build(key: str, tensor: Tensor, replica: ReplicaId, flattened: slice | None) -> list[ShardedTensor]:
            if flattened is not None:
                raise UnsupportedError(
                    "GroupedExperts cannot be stored flattened: use the torch_dist checkpoint format"
                )
            shards = []
            for index, matrix in enumerate(tensor):
                base, expert_offsets = self._expert_key(prefix, layer, index, offsets, separate)
                axis = len(expert_offsets) + dim
                parts = matrix.chunk(2) if gated else (matrix,)
                for number, part in enumerate(parts):
                    name, fragment = "weight", (axis, tp_rank + number * tp_size, tp_size * len(parts))
                    if separate and gated:
                        name, fragment = f"weight_{'wv'[number]}", (axis, tp_rank, tp_size)
                    shards.append(
                        ShardedTensor.from_rank_offsets(
                            base + name,
                            part.contiguous(),
                            *expert_offsets,
                            fragment,
                            replica_id=replica,
                            prepend_axis_num=len(expert_offsets),
                        )
                    )
            return shards

        @torch.no_grad()
        def merge(shards: list[Tensor]) -> Tensor:
            parts = 2 if gated else 1
            return torch.stack([torch.cat(shards[i : i + parts]) for i in range(0, len(shards), parts)])

        return ShardedTensorFactory(
            f"{prefix}experts.{layer}.weight", weight, build, merge, (0, 0, self.dp_group.rank())
        )


def _drop_extra_states(module: torch.nn.Module, state: dict[str, Any], prefix: str, *args: Any) -> None:
    """Drop the empty extra states that checkpoints of Megatron's linear layers hold; these experts have none."""
    for key in [key for key in state if key.startswith(prefix) and key.endswith(_EXTRA_STATE)]:
        del state[key]


def _check_options(config: Any) -> None:
    for name, reason in (
        ("add_bias_linear", "they have no biases"),
        ("fp8", "they compute in BF16 or FP32; FP8 experts come with TransformerEngine"),
        ("fp4", "they compute in BF16 or FP32; FP4 experts come with TransformerEngine"),
        ("delay_wgrad_compute", "weight gradients cannot be delayed without TransformerEngine"),
        ("overlap_dispatch_backward_with_experts_wgrad", "weight gradients cannot be delayed"),
        ("use_te_activation_func", "activations are PyTorch's"),
        ("moe_mlp_glu_interleave_size", "gates and values are not interleaved"),
    ):
        value = getattr(config, name, None)
        if value is not None and value is not False:
            raise ConfigError(f"{name} = {value!r} with GroupedExperts (TransformerConfig): {reason}")
