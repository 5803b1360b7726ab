"""Cases of what TokenDispatcher takes: groups and meshes, settings, devices, dtypes; and how it shows itself."""

from __future__ import annotations

import copy
from collections import UserDict
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from deepep_moe import DispatcherConfig, TokenDispatcher
from deepep_moe.errors import ConfigError, InputError
from tests.distributed.cases_dispatcher import raises, random_batch
from tests.distributed.cases_refusals import one_errs
from tests.launch import case


@case(ranks=(1, 2, 4))
def a_mesh_serves_as_group(group: dist.ProcessGroup) -> None:
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    size = 2 if world > 1 else 1
    mesh = init_device_mesh("cpu", (world // size, size), mesh_dim_names=("replicas", "experts"))
    flat = DeviceMesh.from_group(group, "cpu")
    for given, ranks in ((mesh["experts"], size), (mesh["replicas"], world // size), (flat, world)):
        dispatcher = TokenDispatcher(given, 2 * ranks)
        assert dispatcher.world_size == ranks
        assert dispatcher.backend is TokenDispatcher(given.get_group(), 2 * ranks).backend
        x, topk_idx, weights = random_batch(rank, 5, 8, 2, 2 * ranks)
        sent = dispatcher.dispatch(x, topk_idx, weights)
        out = dispatcher.combine(sent.rows, sent, weights=sent.weights)
        torch.testing.assert_close(out, x * weights.sum(1, keepdim=True))
    assert TokenDispatcher(mesh["experts"], 2 * size).rank == rank % size
    with raises(InputError, "group = a DeviceMesh of 2 dimensions ('replicas', 'experts')", 'such as mesh["ep"]'):
        TokenDispatcher(mesh, 2 * world)
    last = DeviceMesh("cpu", [world - 1])
    if rank == world - 1:
        assert TokenDispatcher(last, 2).world_size == 1
    else:
        with raises(InputError, "group", "must be a DeviceMesh that this process belongs to"):
            TokenDispatcher(last, 2)


@case(ranks=(1,))
def settings_are_a_config_or_a_mapping(group: dist.ProcessGroup) -> None:
    fields = {"expert_alignment": 4, "timeout_seconds": 20}
    for given in (fields, UserDict(fields), DispatcherConfig(**fields)):
        dispatcher = TokenDispatcher(group, 4, given)
        assert dispatcher.config == DispatcherConfig(**fields)
        assert dispatcher.dispatch(torch.ones(1, 8), torch.tensor([[2]])).rows.shape == (4, 8)
    assert TokenDispatcher(group, 4, {}).config == TokenDispatcher(group, 4).config == DispatcherConfig.load()
    with raises(ConfigError, "unknown setting 'expert_alignmnt'", "did you mean expert_alignment?"):
        TokenDispatcher(group, 4, {"expert_alignmnt": 4})
    with raises(ConfigError, "expert_alignment = 'four'"):
        TokenDispatcher(group, 4, {"expert_alignment": "four"})
    for wrong, shown in ((4, "a int"), ("auto", "a str"), ([("num_sms", 4)], "a list")):
        with raises(InputError, f"config = {shown}: must be a DispatcherConfig or a mapping of its fields"):
            TokenDispatcher(group, 4, wrong)


@case(ranks=(1,))
def numbers_and_devices_are_checked(group: dist.ProcessGroup) -> None:
    for wrong in (8.0, "8", None, True, 0, -4, torch.tensor(8.0)):
        with raises(InputError, "num_experts = "):
            TokenDispatcher(group, wrong)
    assert type(TokenDispatcher(group, torch.tensor(8)).num_experts) is int
    for wrong in ("gpu", 3.5, [0]):
        with raises(InputError, f"device = {wrong!r}: must be a torch.device or its name"):
            TokenDispatcher(group, 4, device=wrong)
    assert TokenDispatcher(group, 4, device="cpu").backend.device == torch.device("cpu")


@case(ranks=(1, 2))
def what_combine_cannot_sum_is_refused_before_it_is_sent(group: dist.ProcessGroup) -> None:
    dispatcher = TokenDispatcher(group, 2 * dist.get_world_size(group), DispatcherConfig(timeout_seconds=60))
    x, topk_idx, _ = random_batch(dispatcher.rank, 5, 8, 2, dispatcher.num_experts)
    allowed = "must be one of torch.float32, torch.bfloat16, torch.float16"
    for dtype in (torch.float64, torch.float8_e4m3fn, torch.int32, torch.complex64):
        wrong = x.detach().to(dtype)
        told = f"x = {dtype}: {allowed}"
        for given in (topk_idx, dispatcher.plan(topk_idx)):
            one_errs(
                group,
                lambda: dispatcher.dispatch(x, given),  # noqa: B023
                lambda: dispatcher.dispatch(wrong, given),  # noqa: B023
                InputError,
                told,
            )
    sent = dispatcher.dispatch(x, topk_idx)
    m = sent.rows.shape[0]
    mistakes: list[tuple[Any, str, str]] = [
        (sent.rows.double(), "rows = torch.float64", allowed),
        (sent.rows.to(torch.float8_e4m3fn), "rows = torch.float8_e4m3fn", allowed),
        (sent.rows.new_zeros(m + 1, 8), "rows = shape (", "rows, as many as dispatched.rows"),
        (sent.rows.new_zeros(m), "rows = shape (", "must have shape (any, any)"),
        (sent.rows[:, :0], "rows = shape (", "the hidden size must be at least 1"),
        (sent.rows.to("meta"), "rows = meta", "must be on cpu"),
    ]
    for rows, *told in mistakes:
        one_errs(
            group,
            lambda: dispatcher.combine(sent.rows, sent),
            lambda: dispatcher.combine(rows, sent),  # noqa: B023
            InputError,
            *told,
        )
    torch.testing.assert_close(dispatcher.combine(sent.rows, sent), 2 * x)


@case(ranks=(1, 2))
def a_dispatcher_says_what_it_is(group: dist.ProcessGroup) -> None:
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    dispatcher = TokenDispatcher(group, 4 * world, DispatcherConfig(num_sms=3, fp8_dispatch=True))
    assert repr(dispatcher) == (
        f"TokenDispatcher(num_experts={4 * world}, rank={rank}, world_size={world}, device='cpu', "
        "backend='collective', num_sms=3, fp8_dispatch=True)"
    )
    assert dispatcher.local_experts == range(4 * rank, 4 * rank + 4)
    assert copy.deepcopy([dispatcher])[0] is dispatcher


@case(ranks=(1, 2, 3))
def offsets_are_the_ends_of_the_groups(group: dist.ProcessGroup) -> None:
    world = dist.get_world_size(group)
    for settings in ({}, {"expert_alignment": 4}, {"capacity_factor": 4.0 * world, "max_tokens_per_rank": 9}):
        dispatcher = TokenDispatcher(group, 3 * world, settings)
        for tokens in (9, 0):
            x, topk_idx, _ = random_batch(dispatcher.rank, tokens, 16, 2, 3 * world, dropped=0.3)
            sent = dispatcher.dispatch(x, topk_idx)
            assert sent.offsets.dtype == torch.int32 and sent.offsets.device == sent.rows.device
            assert sent.offsets.tolist() == sent.tokens_per_expert.cumsum(0).tolist()
        # In capacity mode there are rows after the last group; a grouped GEMM leaves them alone.
        matrices = torch.randn(3, 16, 8, generator=torch.Generator().manual_seed(1))
        x, topk_idx, _ = random_batch(dispatcher.rank, 9, 16, 2, 3 * world)
        sent = dispatcher.dispatch(x.detach(), topk_idx)
        out = torch._grouped_mm(sent.rows.bfloat16(), matrices.bfloat16(), offs=sent.offsets)
        begin = 0
        for end, matrix in zip(sent.offsets.tolist(), matrices, strict=True):
            expected = (sent.rows[begin:end].bfloat16().float() @ matrix.bfloat16().float()).bfloat16()
            torch.testing.assert_close(out[begin:end], expected)
            begin = end
