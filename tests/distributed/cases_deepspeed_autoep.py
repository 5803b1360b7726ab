"""AutoEP on ElasticBuffer: a Hugging Face MoE trains as with AutoEP's own collectives.

On a CPU AutoEP lacks two things, which the cases lend it: a barrier that gloo takes, and (its kernels are Triton's) the
plain PyTorch choices of its options. Everything else is AutoEP as it is.
"""

from __future__ import annotations

import shutil
import tempfile
from contextlib import nullcontext
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from deepspeed.module_inject import auto_ep_comm, auto_ep_layer

from deepep_moe import ElasticBuffer
from deepep_moe.errors import ConfigError
from deepep_moe.integrations.deepspeed import auto_ep
from tests.distributed.cases_dispatcher import raises
from tests.distributed.deepspeed_util import deepspeed, near, supports_fp16
from tests.launch import case

TOKENS = 2 * 8


def model() -> Any:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(11)
    config = Qwen3MoeConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        moe_intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=16,
        num_experts=4,
        num_experts_per_tok=2,
        decoder_sparse_step=1,
        mlp_only_layers=[],
    )
    return Qwen3MoeForCausalLM(config)


def ds_config(ours: bool, stage: int = 2, **changes: Any) -> dict[str, Any]:
    expert_parallel = {
        "enabled": True,
        "autoep_size": 2,
        "preset_model": "qwen3_moe",
        "comm_backend": "deepep" if ours else "comm",
        "comm_max_tokens_per_rank": TOKENS,
        "use_grouped_mm": torch.cuda.is_available(),
    }
    expert_parallel.update(changes.pop("expert_parallel", {}))
    return {
        "train_micro_batch_size_per_gpu": 2,
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": stage},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
        "steps_per_print": 1_000_000,
        "expert_parallel": expert_parallel,
        "deepep_moe": {"enabled": ours},
        **changes,
    }


def engine_for(config: dict[str, Any]) -> Any:
    deepspeed.utils.logger.setLevel("WARNING")
    network = model()
    return deepspeed.initialize(
        model=network, model_parameters=network.parameters(), config=config, dist_init_required=False
    )[0]


def train(engine: Any, steps: range = range(4)) -> torch.Tensor:
    losses = []
    for step in steps:
        generator = torch.Generator().manual_seed(10 * step + dist.get_rank())
        tokens = torch.randint(64, (2, 8), generator=generator).to(engine.device)
        loss = engine(input_ids=tokens, labels=tokens).loss
        engine.backward(loss)
        engine.step()
        losses.append(loss.detach().double())
    return torch.stack(losses)


def on_gloo() -> Any:
    """AutoEP waits for its group with ``device_ids``, an argument of NCCL's."""
    real = auto_ep_layer.dist.barrier
    if "nccl" in dist.get_backend():
        return nullcontext()
    return mock.patch.object(auto_ep_layer.dist, "barrier", lambda group=None, **_: real(group=group))


def trains_as_with_collectives(stage: int, **options: Any) -> None:
    stock = train(engine_for(ds_config(False, stage)))
    with on_gloo():
        engine = engine_for(ds_config(True, stage))
        if options.get("checkpointing"):
            engine.module.gradient_checkpointing_enable({"use_reentrant": options["reentrant"]})
        ours = train(engine)
    buffers = {id(exchange.buffer): exchange.buffer for exchange in auto_ep_comm._SHARED_EXCHANGES.values()}
    assert [type(buffer) for buffer in buffers.values()] == [ElasticBuffer]  # one for all layers
    near(ours, stock, 2e-2, "losses")
    auto_ep_comm.destroy_exchanges(engine.module)


@case(ranks=(2,))
def zero0(group: dist.ProcessGroup) -> None:
    trains_as_with_collectives(0)


@case(ranks=(2,))
def zero1(group: dist.ProcessGroup) -> None:
    trains_as_with_collectives(1)


@case(ranks=(2,))
def zero2(group: dist.ProcessGroup) -> None:
    trains_as_with_collectives(2)


@case(ranks=(2,))
def zero3(group: dist.ProcessGroup) -> None:
    trains_as_with_collectives(3)


@case(ranks=(2,))
def checkpointed(group: dist.ProcessGroup) -> None:
    for reentrant in (False, True):
        trains_as_with_collectives(2, checkpointing=True, reentrant=reentrant)


@case(ranks=(2,))
def checkpointed_zero3(group: dist.ProcessGroup) -> None:
    trains_as_with_collectives(3, checkpointing=True, reentrant=False)


@case(ranks=(2,))
def saved_with_one_backend_and_resumed_with_the_other(group: dist.ProcessGroup) -> None:
    folders = [tempfile.mkdtemp() if group.rank() == 0 else None]
    dist.broadcast_object_list(folders, src=0)
    losses = {}
    with on_gloo():
        for writer in (False, True):
            engine = engine_for(ds_config(writer))
            train(engine, range(2))
            engine.save_checkpoint(folders[0], tag=f"ours-{writer}")
            losses[writer, writer] = train(engine, range(2, 4))
            auto_ep_comm.destroy_exchanges(engine.module)
        for reader in (False, True):
            engine = engine_for(ds_config(reader))
            with torch.no_grad():
                for parameter in engine.module.parameters():
                    parameter.fill_(0.5)
            path, _ = engine.load_checkpoint(folders[0], tag=f"ours-{not reader}")
            assert path is not None
            losses[not reader, reader] = train(engine, range(2, 4))
            auto_ep_comm.destroy_exchanges(engine.module)
    for pair, result in losses.items():
        near(result, losses[False, False], 2e-2, f"losses, (saved, resumed) with deepep_moe = {pair}")
    dist.barrier()
    if group.rank() == 0:
        shutil.rmtree(folders[0])


@case(ranks=(2,))
def settings_reach_the_buffer(group: dist.ProcessGroup) -> None:
    with on_gloo():
        engine = engine_for({**ds_config(True), "deepep_moe": {"enabled": True, "timeout_seconds": 17}})
        train(engine, range(1))
        (exchange,) = auto_ep_comm._SHARED_EXCHANGES.values()
        assert exchange.buffer._backend.config.timeout_seconds == 17
        assert exchange.buffer.num_max_tokens_per_rank == TOKENS
        too_many = torch.zeros(3, 8, dtype=torch.int64, device=engine.device)
        with raises(RuntimeError, "24 tokens", "comm_max_tokens_per_rank"):
            engine(input_ids=too_many, labels=too_many)
    auto_ep_comm.destroy_exchanges(engine.module)


@case(ranks=(2,))
def errors_at_initialisation(group: dist.ProcessGroup) -> None:
    on, off = {"enabled": True}, {"enabled": False}
    refused: list[tuple[dict[str, Any], tuple[str, ...]]] = [
        ({"bf16": {"enabled": False}}, ('comm_backend = "deepep"', "bf16.enabled")),
        *([({"bf16": off, "fp16": on}, ('comm_backend = "deepep"', "bf16.enabled"))] if supports_fp16() else []),
        ({"tensor_parallel": {"autotp_size": 2}}, ("autotp_size = 2", "fold")),
        ({"expert_parallel": {"expert_tensor_parallel_size": 2}}, ("expert_tensor_parallel_size = 2", "fold")),
        ({"expert_parallel": {"comm_max_tokens_per_rank": 0}}, ("comm_max_tokens_per_rank = 0", "longest")),
        ({"deepep_moe": {"enabled": True, "fp8_dispatch": True}}, ("deepep_moe.fp8_dispatch = True", "native MoE")),
        (
            {"deepep_moe": {"enabled": True, "max_tokens_per_rank": 3}},
            ("max_tokens_per_rank = 3", "comm_max_tokens_per_rank = 16"),
        ),
    ]
    for changes, texts in refused:
        with raises(ConfigError, *texts):
            engine_for(ds_config(True, **changes))


@case(ranks=(2,))
def deep_ep_elsewhere_in_the_process_is_left_alone(group: dist.ProcessGroup) -> None:
    import sys

    auto_ep.install(auto_ep.DispatcherConfig())
    assert auto_ep_comm._import_deep_ep().topk_idx_t is torch.int64
    assert "deep_ep" not in sys.modules
