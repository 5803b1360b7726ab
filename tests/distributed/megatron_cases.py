"""Cases for ``test_megatron.py``: Megatron-Core on the ``deepep`` dispatcher against its own ``alltoall``."""

from __future__ import annotations

import torch
import torch.distributed as dist

from tests.launch import case, include, on_ranks

_util = on_ranks("tests.distributed.megatron_util")


@case(ranks=(2,))
def gpt_learns_like_alltoall(group: dist.ProcessGroup) -> None:
    util = _util()
    layout = util.parallel(ep=2)
    curves, grads = {}, {}
    for dispatcher in ("alltoall", "deepep"):
        model = util.gpt(util.configure(dispatcher, moe_shared_expert_intermediate_size=16, **layout))
        optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
        curves[dispatcher], grads[dispatcher] = [], []
        for step in range(20):
            tokens, positions, mask, labels = util.batch(step)
            loss = model(tokens, positions, mask, labels=labels).mean()
            optimizer.zero_grad()
            loss.backward()
            for parameter in model.parameters():
                if getattr(parameter, "allreduce", True):  # experts are not replicated
                    dist.all_reduce(parameter.grad)
            if step in (0, 19):
                grads[dispatcher].append({name: g.clone() for name, g in util.gradients(model).items()})
            optimizer.step()
            curves[dispatcher].append(loss.item())
    for step, (expected, actual) in enumerate(zip(curves["alltoall"], curves["deepep"])):
        assert abs(actual - expected) <= 1e-5 * expected, f"step {step}: {actual} instead of {expected}"
    assert curves["deepep"][-1] < 0.8 * curves["deepep"][0]
    names = {name for name, _ in model.named_parameters()}
    for expected, actual in zip(grads["alltoall"], grads["deepep"]):
        assert actual.keys() == names
        for name in names:
            util.assert_near(name, actual[name], expected[name])


@case(ranks=(2,))
def one_layer(group: dist.ProcessGroup) -> None:
    util = _util()
    util.assert_same_layer(**util.parallel(ep=2))


@case(ranks=(1,))
def group_of_one(group: dist.ProcessGroup) -> None:
    util = _util()
    util.assert_same_layer(**util.parallel())


@case(ranks=(2,))
def one_local_expert(group: dist.ProcessGroup) -> None:
    util = _util()
    util.assert_same_layer(num_moe_experts=2, moe_router_topk=1, moe_router_pre_softmax=True, **util.parallel(ep=2))


@case(ranks=(2,))
def replicated_experts(group: dist.ProcessGroup) -> None:
    """Data parallel only: every rank holds all experts."""
    util = _util()
    util.assert_same_layer(**util.parallel(ep=1))


@case(ranks=(2,))
def shared_experts(group: dist.ProcessGroup) -> None:
    util = _util()
    layout = util.parallel(ep=2)
    util.assert_same_layer(moe_shared_expert_intermediate_size=24, **layout)
    for gate in (False, True):
        util.assert_same_layer(
            moe_shared_expert_intermediate_size=24,
            moe_shared_expert_overlap=True,
            moe_shared_expert_gate=gate,
            **layout,
        )


@case(ranks=(2,))
def token_dropping(group: dist.ProcessGroup) -> None:
    util = _util()
    layout = util.parallel(ep=2)
    for policy in ("probs", "position"):
        options = {"moe_expert_capacity_factor": 0.5, "moe_token_drop_policy": policy, **layout}
        _, dropped = util.assert_same_layer(**options)
        _, padded = util.assert_same_layer(moe_pad_expert_input_to_capacity=True, **options)
        for name, value in dropped.items():
            util.assert_near(name, padded[name], value)


@case(ranks=(2,))
def padding_to_capacity_gives_experts_equal_shapes(group: dist.ProcessGroup) -> None:
    util = _util()
    options = {"moe_expert_capacity_factor": 1.5, "moe_pad_expert_input_to_capacity": True, **util.parallel(ep=2)}
    seen = []
    for dispatcher in ("alltoall", "deepep"):
        layer = util.moe_layer(util.configure(dispatcher, **options))
        layer.experts.register_forward_pre_hook(
            lambda module, args: seen.append((args[0].shape, args[1].tolist(), args[2].shape))
        )
        util.run_layer(layer, 16)
    assert seen[0] == seen[1]
    assert len(set(seen[0][1])) == 1


@case(ranks=(2,))
def recompute(group: dist.ProcessGroup) -> None:
    util = _util()
    layout = util.parallel(ep=2)
    for modules in (["moe"], ["shared_experts"]):
        util.assert_same_layer(
            recompute_granularity="selective",
            recompute_modules=modules,
            moe_shared_expert_intermediate_size=24,
            **layout,
        )


@case(ranks=(2,))
def router_dtype(group: dist.ProcessGroup) -> None:
    util = _util()
    layout = util.parallel(ep=2)
    for dtype in ("fp32", "fp64"):
        layer = util.assert_same_layer(moe_router_dtype=dtype, **layout)[0]
        seen: list[torch.dtype] = []
        layer.experts.register_forward_pre_hook(lambda module, args, seen=seen: seen.append(args[2].dtype))
        util.run_layer(layer, 4)
        assert seen == [{"fp32": torch.float32, "fp64": torch.float64}[dtype]]


@case(ranks=(2,))
def sigmoid_router_with_groups(group: dist.ProcessGroup) -> None:
    util = _util()
    util.assert_same_layer(
        moe_router_score_function="sigmoid",
        moe_router_enable_expert_bias=True,
        moe_router_num_groups=4,
        moe_router_group_topk=2,
        moe_router_topk=3,
        moe_router_load_balancing_type="none",
        moe_aux_loss_coeff=0.0,
        **util.parallel(ep=2),
    )


@case(ranks=(2,))
def probabilities_on_the_input(group: dist.ProcessGroup) -> None:
    util = _util()
    util.assert_same_layer(
        moe_apply_probs_on_input=True, moe_router_topk=1, moe_router_pre_softmax=True, **util.parallel(ep=2)
    )


@case(ranks=(2,))
def padding_for_quantization(group: dist.ProcessGroup) -> None:
    """FP8 itself needs TransformerEngine; the padding does not."""
    util = _util()
    layout = util.parallel(ep=2)
    layer, _ = util.assert_same_layer(after={"fp8": "e4m3", "moe_router_padding_for_quantization": True}, **layout)
    counts = []
    layer.experts.register_forward_pre_hook(lambda module, args: counts.extend(args[1].tolist()))
    util.run_layer(layer, 16)
    assert layer.token_dispatcher.dispatcher.config.expert_alignment > 1
    assert all(count % layer.token_dispatcher.dispatcher.config.expert_alignment == 0 for count in counts)


@case(ranks=(2,))
def latent_experts(group: dist.ProcessGroup) -> None:
    """Dispatch sees the latent width. Megatron projects with TransformerEngine's linear layer: a stand-in here."""
    util = _util()
    layout = util.parallel(ep=2)
    with util.stand_ins_for_transformer_engine():
        layer, _ = util.assert_same_layer(moe_latent_size=16, moe_shared_expert_intermediate_size=24, **layout)
        widths = []
        layer.experts.register_forward_pre_hook(lambda module, args: widths.append(args[0].shape[1]))
        util.run_layer(layer, 4)
        assert widths == [16]
        util.assert_grouped_experts_agree(moe_latent_size=16, **layout)


@case(ranks=(1,))
def preprocessing_never_waits_for_the_device(group: dist.ProcessGroup) -> None:
    """On fake CUDA tensors nothing can be read back: what a CUDA graph may capture."""
    from torch._subclasses import FakeTensorMode

    util = _util()
    layout = util.parallel()
    for options in ({}, {"moe_expert_capacity_factor": 1.0, "moe_pad_expert_input_to_capacity": True}):
        dispatcher = util.moe_layer(util.configure("deepep", **options, **layout)).token_dispatcher
        with FakeTensorMode():
            x = torch.empty(16, 2, util.HIDDEN, device="cuda:0")
            routing_map = torch.empty(32, util.EXPERTS, dtype=torch.bool, device="cuda:0")
            tokens, probs = dispatcher.dispatch_preprocess(
                x, routing_map, torch.empty(32, util.EXPERTS, device="cuda:0")
            )
        assert tokens.shape == (32, util.HIDDEN)
        assert probs.shape == dispatcher.topk_idx.shape == (32, 2)
        assert all(isinstance(getattr(dispatcher, name), torch.Tensor) for name in dispatcher.cudagraph_attrs)


@case(ranks=(2,))
def evaluation_without_gradients(group: dist.ProcessGroup) -> None:
    util = _util()
    layout = util.parallel(ep=2)
    x = torch.randn(4, 2, util.HIDDEN, generator=torch.Generator().manual_seed(dist.get_rank()))
    outputs = []
    for dispatcher in ("alltoall", "deepep"):
        layer = util.moe_layer(util.configure(dispatcher, **layout)).eval()
        with torch.no_grad():
            outputs.append(layer(x)[0])
    util.assert_near("output", outputs[1], outputs[0])


@case(ranks=(2,))
def interleaved_micro_batches(group: dist.ProcessGroup) -> None:
    """Two forwards before their backwards, in either order: pipeline schedules do that."""
    util = _util()
    layer = util.moe_layer(util.configure("deepep", **util.parallel(ep=2)))

    def forward(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        x = torch.randn(6, 2, util.HIDDEN, generator=torch.Generator().manual_seed(seed)).requires_grad_()
        return x, layer(x)[0]

    alone = []
    for seed in (1, 2):
        x, output = forward(seed)
        output.square().sum().backward()
        alone.append(x.grad)
    (x1, output1), (x2, output2) = forward(1), forward(2)
    output1.square().sum().backward()
    output2.square().sum().backward()
    util.assert_near("first", x1.grad, alone[0])
    util.assert_near("second", x2.grad, alone[1])


@case(ranks=(2,))
def one_forward_one_backward_overlap(group: dist.ProcessGroup) -> None:
    """Megatron's own fine-grained schedule: nodes with detached inputs, some of them freed after the forward."""
    util = _util()
    layout = util.parallel(ep=2)
    batches = [util.batch(step) for step in (1, 2, 3)]
    for shared in (None, 24):
        model = util.gpt(util.configure("deepep", moe_shared_expert_intermediate_size=shared, **layout))
        expected = {name: value.clone() for name, value in util.run_in_turn(model, batches).items()}
        model.zero_grad()
        util.assert_all_near(util.run_overlapped(model, batches), expected)


@case(ranks=(2,))
def recomputed_layer_norm(group: dist.ProcessGroup) -> None:
    """Frees the tensor that was dispatched and computes it again in the backward, in both schedules."""
    util = _util()
    layout = util.parallel(ep=2)
    batches = [util.batch(step) for step in (1, 2)]
    results = []
    for options in ({}, {"recompute_granularity": "selective", "recompute_modules": ["layernorm"]}):
        for overlapped in (False, True):
            model = util.gpt(util.configure("deepep", **options, **layout))
            with util.stand_ins_for_transformer_engine():
                if overlapped:
                    util.run_overlapped(model, batches)
                else:
                    for tokens, positions, mask, labels in batches:
                        model(tokens, positions, mask, labels=labels).sum().backward()
            results.append(util.gradients(model))
    assert model.decoder.layers[0].recompute_pre_mlp_layernorm
    for actual in results[1:]:
        for name, expected in results[0].items():
            util.assert_near(name, actual[name], expected)


@case(ranks=(2,))
def expert_tensor_parallel(group: dist.ProcessGroup) -> None:
    util = _util()
    layout = util.parallel(tp=2, etp=2)
    util.assert_same_layer(**layout)
    util.assert_same_layer(moe_shared_expert_intermediate_size=24, moe_shared_expert_overlap=True, **layout)
    util.assert_same_layer(moe_expert_capacity_factor=0.5, **layout)
    util.assert_same_layer(moe_expert_capacity_factor=0.5, moe_pad_expert_input_to_capacity=True, **layout)


@case(ranks=(4,))
def expert_and_tensor_parallel(group: dist.ProcessGroup) -> None:
    util = _util()
    for layout in ({"tp": 2, "ep": 2, "etp": 2}, {"tp": 2, "ep": 2, "etp": 1}, {"tp": 2, "ep": 4, "etp": 1}):
        util.assert_same_layer(moe_shared_expert_intermediate_size=24, **util.parallel(**layout))


@case(ranks=(2,))
def grouped_experts_compute_like_sequential_ones(group: dist.ProcessGroup) -> None:
    """Same initial weights, outputs and gradients as ``SequentialMLP``; chosen by the plugin's switch."""
    util = _util()
    for layout in ({"ep": 2}, {"tp": 2, "etp": 2}):
        for options in (
            {},
            {"gated_linear_unit": False, "activation_func": torch.nn.functional.gelu},
            {"recompute_granularity": "selective", "recompute_modules": ["moe_act"], "moe_grouped_gemm": True},
            {"moe_router_topk": 1, "moe_router_pre_softmax": True, "moe_apply_probs_on_input": True},
            {"use_cpu_initialization": True},
            {"num_moe_experts": 2, "moe_expert_capacity_factor": 0.1},
        ):
            util.assert_grouped_experts_agree(**options, **util.parallel(**layout))


@case(ranks=(2,))
def checkpoints_of_grouped_and_sequential_experts(group: dist.ProcessGroup) -> None:
    """Each loads what the other saved, on another parallel layout too."""
    util = _util()
    ep, etp = {"ep": 2}, {"tp": 2, "etp": 2}
    one_key_per_expert = {"singleton_local_shards": True}
    for writes_grouped in (False, True):
        util.assert_checkpoint_moves(ep, etp, writes_grouped, {})
        util.assert_checkpoint_moves(etp, ep, writes_grouped, one_key_per_expert)


include(
    __name__,
    "tests.distributed.megatron_capacity_cases",
    "tests.distributed.megatron_refusal_cases",
)
