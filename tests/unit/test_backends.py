"""Choosing a backend in one process: a group of one rank needs no launcher."""

from __future__ import annotations

import copy
import logging
import pickle
import re
import subprocess
import sys
from collections.abc import Iterator
from typing import get_args

import pytest
import torch
import torch.distributed as dist

from deepep_moe import Buffer, DispatcherConfig, ElasticBuffer, TokenDispatcher, backends, extension, notices
from deepep_moe.backends import BACKENDS, Backend, Layout, get_backend
from deepep_moe.backends.collective import CollectiveBackend
from deepep_moe.backends.hierarchical import HierarchicalBackend
from deepep_moe.backends.nvlink import NVLinkBackend
from deepep_moe.config import BackendName
from deepep_moe.domain import SEVERAL_HOSTS
from deepep_moe.errors import CapacityError, HandleError, InputError, UnsupportedError
from deepep_moe.overlap import Overlap

CPU = torch.device("cpu")


@pytest.fixture
def group() -> Iterator[dist.ProcessGroup]:
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    yield dist.group.WORLD
    dist.destroy_process_group()


def test_without_a_process_group_the_error_says_what_to_call() -> None:
    with pytest.raises(InputError, match="init_process_group"):
        get_backend(None, CPU)
    with pytest.raises(InputError, match="init_process_group"):
        TokenDispatcher(None, 4)


def test_one_backend_per_group_device_and_config(group: dist.ProcessGroup) -> None:
    first = get_backend(group, CPU)
    assert isinstance(first, Backend)
    assert get_backend(None) is first
    assert get_backend(group, CPU, DispatcherConfig(timeout_seconds=3)) is not first
    with pytest.raises(InputError, match="group"):
        get_backend("world", CPU)  # type: ignore[arg-type]


def test_auto_says_what_it_took_and_why(group: dist.ProcessGroup, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="deepep_moe"):
        backend = get_backend(group, CPU, DispatcherConfig(num_sms=3))
    assert backend.name == "collective"
    assert "collective on cpu, 1 ranks: nvlink needs CUDA tensors" in caplog.text


def test_asking_for_what_cannot_run_is_an_error(group: dist.ProcessGroup) -> None:
    with pytest.raises(UnsupportedError, match=r"nvlink cannot run here: nvlink needs CUDA.*collective runs anywhere"):
        get_backend(group, CPU, DispatcherConfig(backend="nvlink"))


@pytest.mark.parametrize(
    ("nvlink", "hierarchical", "passed_by", "warns"),
    [
        ("it was not built: build it", None, "the group is on one node", True),
        (SEVERAL_HOSTS, "unequal nodes: start equally many", None, True),
        (SEVERAL_HOSTS, None, "every node has one rank", False),
    ],
)
def test_a_slower_backend_than_necessary_is_one_warning_with_the_remedy(
    nvlink: str,
    hierarchical: str | None,
    passed_by: str | None,
    warns: bool,
    group: dist.ProcessGroup,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(notices, "_warned", set())
    monkeypatch.setattr(backends, "gather", lambda phase, group, device, timeout, mine: [mine])
    monkeypatch.setattr(NVLinkBackend, "supports", staticmethod(lambda *_: nvlink))
    monkeypatch.setattr(HierarchicalBackend, "supports", staticmethod(lambda *_: hierarchical))
    monkeypatch.setattr(HierarchicalBackend, "why_not_auto", staticmethod(lambda *_: passed_by))
    monkeypatch.setattr(CollectiveBackend, "supports", staticmethod(lambda *_: None))
    monkeypatch.setattr(extension, "why_not_on", lambda device: "there is no GPU")
    for _ in range(2):
        assert backends._make(group, torch.device("cuda", 0), DispatcherConfig()).name == "collective"
    told = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(told) == warns
    for text in told:
        assert (hierarchical or nvlink) in text
        assert "backend collective" in text and "docs/multinode.md" in text


WITHOUT_EXTENSION = """
import sys
sys.modules["deepep_moe._C"] = None  # an import of it fails, as where it was not built
import torch, torch.distributed as dist
from deepep_moe import Buffer, scale_rows
from deepep_moe.backends.nvlink import NVLinkBackend

dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
print(NVLinkBackend.supports(dist.group.WORLD, torch.device("cuda", 0)))
assert not Buffer.is_sm90_compiled()
assert scale_rows(torch.ones(2, 3), torch.tensor([1.0, 2.0])).tolist() == [[1.0] * 3, [2.0] * 3]
dist.destroy_process_group()
"""


def test_without_the_extension_nvlink_says_why_and_nothing_else_misses_it() -> None:
    done = subprocess.run([sys.executable, "-c", WITHOUT_EXTENSION], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "the CUDA extension is not built for this Python" in done.stdout
    assert "install with nvcc in PATH to build it" in done.stdout


def test_a_closed_backend_says_so(group: dist.ProcessGroup) -> None:
    backend = get_backend(group, CPU, DispatcherConfig(num_sms=5))
    backend.close()
    backend.close()
    with pytest.raises(HandleError, match="closed"):
        backend.plan(torch.zeros(1, 1, dtype=torch.int64), 1)


def test_a_closed_backend_is_not_handed_out_again(group: dist.ProcessGroup) -> None:
    config = DispatcherConfig(num_sms=6)
    first = get_backend(group, CPU, config)
    assert first.usable
    first.close()
    assert not first.usable
    second = get_backend(group, CPU, config)
    assert second is not first and second.usable
    assert get_backend(group, CPU, config) is second


def test_a_plan_of_another_backend_is_refused(group: dist.ProcessGroup) -> None:
    first, second = get_backend(group, CPU), get_backend(group, CPU, DispatcherConfig(num_sms=8))
    assert first.number != second.number
    plan = first.plan(torch.zeros(2, 1, dtype=torch.int64), 2)
    assert plan.owner == first.number
    x = torch.ones(2, 4)
    for call in (second.dispatch, second.combine):
        with pytest.raises(HandleError, match="another group or configuration"):
            call(plan, x, layout=Layout.BY_SOURCE)
        with pytest.raises(HandleError, match="plan is a str"):
            call("plan", x, layout=Layout.BY_SOURCE)  # type: ignore[arg-type]
    assert torch.equal(first.dispatch(plan, x, layout=Layout.BY_SOURCE).x, x)


def test_plans_are_numbered_and_refused_ones_count(group: dist.ProcessGroup) -> None:
    backend = get_backend(group, CPU)
    routes = torch.zeros(2, 1, dtype=torch.int64)
    first = backend.plan(routes, 2)
    with pytest.raises(InputError):
        backend.plan(routes.float(), 2)
    with pytest.raises(InputError, match="told"):
        backend.refuse("plan", InputError("told", 1, "a rule"))
    assert backend.plan(routes, 2).number == first.number + 3


def test_the_setting_and_the_registry_know_the_same_backends() -> None:
    assert get_args(BackendName) == ("auto", *sorted(BACKENDS))


def test_plans_survive_later_plans_and_changed_inputs(group: dist.ProcessGroup) -> None:
    backend = get_backend(group, CPU)
    topk_idx = torch.tensor([[1], [0], [1]])
    plan = backend.plan(topk_idx, 2)
    topk_idx.zero_()
    backend.plan(topk_idx, 2)
    assert plan.topk_idx.tolist() == [[1], [0], [1]]
    x = torch.tensor([[1.0], [2.0], [3.0]])
    assert backend.dispatch(plan, x, layout=Layout.BY_EXPERT).x.tolist() == [[2.0], [1.0], [3.0]]


def test_copies_share_and_pickling_says_why_not(group: dist.ProcessGroup) -> None:
    class Layer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(4, 4))
            self.overlap = Overlap(TokenDispatcher(group, 2))
            self.buffers_of_others = [Buffer(group), ElasticBuffer(group), self.overlap.dispatcher.backend]

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            sent = self.overlap.dispatcher.dispatch(x @ self.weight, torch.tensor([[0], [1]]))
            return self.overlap.dispatcher.combine(sent.rows, sent)

    layer = Layer()
    twin = copy.deepcopy(layer)
    assert twin.overlap.dispatcher is layer.overlap.dispatcher
    assert copy.copy(layer.overlap) is layer.overlap
    with torch.no_grad():
        twin.weight.mul_(2)
    x = torch.ones(2, 4)
    assert torch.equal(twin(x), 2 * layer(x))
    for kind, value in (
        ("TokenDispatcher", layer.overlap.dispatcher),
        ("Overlap", layer.overlap),
        ("Overlap", layer),
        ("Buffer", layer.buffers_of_others[0]),
        ("ElasticBuffer", layer.buffers_of_others[1]),
        ("CollectiveBackend", layer.buffers_of_others[2]),
    ):
        with pytest.raises(UnsupportedError, match=f"a {kind} cannot be pickled: it belongs to a process group"):
            pickle.dumps(value.__dict__ if isinstance(value, Layer) else value)


def test_overflow_names_the_settings_that_gave_the_room(group: dist.ProcessGroup) -> None:
    routes, x = torch.zeros(4, 2, dtype=torch.int64), torch.ones(4, 4)
    for settings, told in (
        ({"capacity_factor": 0.25}, r"capacity_factor = 0.25 with max_tokens_per_rank = 0 \(so the rank's own tokens"),
        (
            {"capacity_factor": 1.0, "max_tokens_per_rank": 1},
            r"capacity_factor = 1 with max_tokens_per_rank = 1 gives room for 1",
        ),
    ):
        dispatcher = TokenDispatcher(group, 2, DispatcherConfig(**settings))  # type: ignore[arg-type]
        with pytest.raises(CapacityError, match=rf"rank 0 needs room for 4 received tokens, but {told}") as error:
            dispatcher.dispatch(x, routes)
        assert "max_recv" not in str(error.value)
    huge = TokenDispatcher(group, 2, DispatcherConfig(capacity_factor=1e6, max_tokens_per_rank=2**20))
    with pytest.raises(InputError, match=r"capacity_factor = 1000000\.0: gives room for"):
        huge.dispatch(x, routes)


def test_waits_are_printed(group: dist.ProcessGroup, capsys: pytest.CaptureFixture[str]) -> None:
    backend = get_backend(group, CPU, DispatcherConfig(debug_waits=True))
    backend.plan(torch.zeros(1, 1, dtype=torch.int64), 1)
    backend.close()
    backend.close()
    told = capsys.readouterr().out
    assert re.fullmatch(
        r"deepep_moe: rank 0 waited for its peers [0-9.]+ ms in plan, [0-9.]+ ms in dispatch, [0-9.]+ ms in combine\n",
        told,
    )


def test_second_derivatives_of_a_linear_path(group: dist.ProcessGroup) -> None:
    """Gradients of gradients need no code of their own: the backward is made of the same operators."""
    dispatcher = TokenDispatcher(group, 2)
    x = torch.randn(4, 3, requires_grad=True)
    weights = torch.rand(4, 2, requires_grad=True)
    topk_idx = torch.tensor([[0, 1]] * 4)

    def loss(x: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        dispatched = dispatcher.dispatch(x, topk_idx, weights)
        return dispatcher.combine(dispatched.rows.pow(3), dispatched, weights=dispatched.weights).sum()

    (grad,) = torch.autograd.grad(loss(x, weights), x, create_graph=True)
    got = torch.autograd.grad(grad.sum(), (x, weights))
    total = weights.sum(1, keepdim=True)
    torch.testing.assert_close(got[0], (6 * x * total).detach())
    torch.testing.assert_close(got[1], (3 * x.square()).sum(1, keepdim=True).expand(4, 2).detach())


def test_the_default_device_is_that_of_nccl(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also of a group that was made without naming a backend, which has NCCL for GPUs and gloo for CPUs."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(dist, "get_backend", lambda group: "undefined")
    for config, device in (("cpu:gloo,cuda:nccl", torch.device("cuda", 3)), ("cpu:gloo,cuda:gloo", CPU)):
        monkeypatch.setattr(dist, "get_backend_config", lambda group: config)  # noqa: B023
        assert backends.default_device(object()) == device
