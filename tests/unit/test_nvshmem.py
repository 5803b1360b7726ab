"""NVSHMEM as far as no GPU is needed: the build and what it exports, memory, transports."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from deepep_moe import nvshmem
from deepep_moe.errors import PeerTimeoutError, UnsupportedError
from deepep_moe.nvshmem_transports import NodeFacts, expected, look, summary
from deepep_moe.tools import nvshmem as tool
from deepep_moe.tools.nvshmem import Shift, report
from deepep_moe.tools.world import World
from tests.launch import ROOT

BUILT = importlib.util.find_spec("deepep_moe._nvshmem")
needs_module = pytest.mark.skipif(BUILT is None, reason="built without NVSHMEM")

# -- the module ---------------------------------------------------------------------------------------------------


@needs_module
def test_the_module_exports_only_its_entry_point_and_loads_without_a_gpu() -> None:
    assert BUILT is not None and BUILT.origin is not None
    listed = subprocess.run(["nm", "-D", "--defined-only", BUILT.origin], capture_output=True, text=True, check=True)
    assert [line.split()[-1] for line in listed.stdout.splitlines()] == ["PyInit__nvshmem"]
    assert nvshmem.why_missing() is None
    module = nvshmem.module()
    assert module.loaded_version()[0] == module.built_version()[0] == 3
    first, second = module.new_unique_id(), module.new_unique_id()
    assert len(first) == len(second) == 128 and first != second
    assert not module.is_started()
    with pytest.raises(ValueError, match="id has 3 bytes, not 128"):
        module.start(0, 1, b"abc", 0)


def test_the_package_needs_nothing_of_nvshmem() -> None:
    """Neither our module nor the library is loaded by importing everything that programs import."""
    code = (
        "import sys\n"
        "sys.modules['deepep_moe._nvshmem'] = None\n"  # any import of it fails
        "import deepep_moe, deepep_moe.backends, deepep_moe.buffer, deepep_moe.elastic, deepep_moe.tools.doctor\n"
        "print('libnvshmem' in open('/proc/self/maps').read())\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.stdout == "False\n", done.stderr


def test_why_it_is_missing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    nvshmem._load.cache_clear()
    try:
        assert "built without NVSHMEM" in (nvshmem.why_missing() or "")
        with pytest.raises(nvshmem.UnsupportedError, match="install nvidia-nvshmem-cu13"):
            nvshmem.module()
    finally:
        nvshmem._load.cache_clear()


def test_a_call_that_does_not_return_is_left_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    import threading

    monkeypatch.setattr(nvshmem, "_hung", None)
    caller, never = nvshmem._Caller(), threading.Event()
    assert caller.problem_of(lambda: None, "a call", 5) is None
    assert caller.problem_of(lambda: 1 // 0, "a call", 5) == "a call: integer division or modulo by zero"
    with pytest.raises(nvshmem.PeerTimeoutError, match=r"initialising NVSHMEM did not end within 0\.1 s"):
        caller.problem_of(lambda: never.wait(30), "initialising NVSHMEM", 0.1)
    never.set()
    assert "initialising NVSHMEM did not end" in str(nvshmem._hung)


# -- symmetric memory ---------------------------------------------------------------------------------------------


def test_parts_are_taken_where_all_ranks_have_room() -> None:
    whole = [(0, 1000)]
    mine = nvshmem._without(whole, 0, 300)
    assert mine == [(300, 700)]
    theirs = nvshmem._without(whole, 500, 100)
    assert theirs == [(0, 500), (600, 400)]
    assert nvshmem._common_ranges([mine, theirs]) == [(300, 200), (600, 400)]
    assert nvshmem._common_ranges([mine, theirs, []]) == []
    assert nvshmem._merged([*mine, (0, 300)]) == whole
    assert nvshmem._without(whole, 0, 1000) == []


# -- which transport ----------------------------------------------------------------------------------------------


def node(host: str, **facts: Any) -> NodeFacts:
    full: dict[str, Any] = {"gpu_memory_to_nic": True, "gdrcopy": True, "gpu_rings_nic": True}
    full |= {"libfabric": True, "libibverbs": True, "nics": {"mlx5_0": "mlx5_core"}, **facts}
    return NodeFacts(host, **full)


IBGDA = {"NVSHMEM_IB_ENABLE_IBGDA": "1"}
EFA = {"NVSHMEM_REMOTE_TRANSPORT": "libfabric", "NVSHMEM_LIBFABRIC_PROVIDER": "efa"}


@pytest.mark.parametrize(
    ("facts", "transport", "note"),
    [
        ({"variables": IBGDA}, "IBGDA", None),
        ({}, "IBRC", "NVSHMEM_IB_ENABLE_IBGDA=1"),
        ({"variables": IBGDA, "gpu_rings_nic": False}, "IBGDA", "PeerMappingOverride=1"),
        ({"variables": {**IBGDA, "NVSHMEM_IBGDA_NIC_HANDLER": "gpu"}, "gpu_rings_nic": False}, "IBRC", "NIC_HANDLER"),
        ({"variables": IBGDA, "nics": {"irdma0": "irdma"}}, "IBRC", "ConnectX"),
        ({"variables": IBGDA, "gpu_memory_to_nic": False}, "IBGDA", "nvidia_peermem"),
        ({"nics": {}}, "none", "no RDMA NIC"),
        ({"libibverbs": False}, "none", "rdma-core"),
        ({"variables": {"NVSHMEM_REMOTE_TRANSPORT": "none"}}, "none", "NVSHMEM_REMOTE_TRANSPORT=none"),
        (
            {"variables": {"NVSHMEM_REMOTE_TRANSPORT": "ibrcc"}},
            "none",
            "NVSHMEM_REMOTE_TRANSPORT=ibrcc: allowed is one of",
        ),
        ({"variables": {"NVSHMEM_REMOTE_TRANSPORT": "UCX"}}, "UCX", None),
        ({"nics": {"rdmap0": "efa"}}, "none", "NVSHMEM_REMOTE_TRANSPORT=libfabric"),
        ({"nics": {"rdmap0": "efa"}, "variables": EFA}, "libfabric", None),
        ({"nics": {"rdmap0": "efa"}, "variables": EFA, "gdrcopy": False}, "none", "GDRCopy"),
        (
            {"nics": {"rdmap0": "efa"}, "variables": {"NVSHMEM_REMOTE_TRANSPORT": "libfabric"}},
            "none",
            "NVSHMEM_LIBFABRIC_PROVIDER=efa",
        ),
    ],
)
def test_transport_between_nodes(facts: dict[str, Any], transport: str, note: str | None) -> None:
    found, missing = expected(node("a", **facts), node("b", **facts))
    assert found == transport
    assert (not missing) if note is None else any(note in text for text in missing)


def test_transports_of_several_nodes() -> None:
    assert expected(node("a", nics={}), node("a", nics={})) == ("P2P", [])
    assert expected(node("a"), node("b", variables=EFA))[0] == "none"
    assert summary([node("a", variables=IBGDA), node("b", variables=IBGDA)]) == ("IBGDA between all nodes", [])
    told, missing = summary([node("a", variables=IBGDA), node("b", variables=IBGDA), node("c", nics={})])
    assert told == "IBGDA between nodes 0-1; none between nodes 0-2, 1-2"
    assert len(missing) == 1 and "no RDMA NIC" in missing[0]
    facts = node("a", variables=IBGDA)
    assert NodeFacts(**facts.as_dict()) == facts


def test_facts_of_a_node_are_read_from_its_files(tmp_path: Path) -> None:
    (tmp_path / "sys/bus/drivers/mlx5_core").mkdir(parents=True)
    device = tmp_path / "sys/class/infiniband/mlx5_0/device"
    device.mkdir(parents=True)
    (device / "driver").symlink_to(tmp_path / "sys/bus/drivers/mlx5_core")
    (tmp_path / "sys/module/nvidia_peermem").mkdir(parents=True)
    (tmp_path / "proc/driver/nvidia").mkdir(parents=True)
    (tmp_path / "proc/driver/nvidia/params").write_text('RegistryDwords: "PeerMappingOverride=1;"\n')
    facts = look(str(tmp_path), {**IBGDA, "HOME": "x"})
    assert facts.nics == {"mlx5_0": "mlx5_core"}
    assert facts.gpu_memory_to_nic and facts.gpu_rings_nic and not facts.gdrcopy
    assert facts.variables == IBGDA

    nothing = look(str(tmp_path / "empty"), {})
    assert not nothing.nics and not nothing.gpu_memory_to_nic and not nothing.gpu_rings_nic


# -- the self-test's report ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (UnsupportedError("rank 1: built without"), {0: "expected: one node\nfailed: rank 1: built without\n", 1: ""}),
        (
            PeerTimeoutError("rank 1 waited"),
            {
                0: "expected: one node\nfailed: rank 1 waited\n",
                1: "rank 1\nexpected: one node\nfailed: rank 1 waited\n",
            },
        ),
    ],
)
def test_what_all_ranks_know_is_printed_once(
    error: Exception, told: dict[int, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tool, "gather", lambda *_: [look("/nothing", {}).as_dict()])
    monkeypatch.setattr(tool.nvshmem, "initialize", mock.Mock(side_effect=error))
    monkeypatch.setattr(tool.dist, "group", mock.Mock())
    for rank, text in told.items():
        world = World(rank, 2, torch.device("cpu"))
        monkeypatch.setattr(tool, "ranks_of_this_run", lambda world=world: nullcontext(world))
        assert tool.main([]) == 1
        assert capsys.readouterr().out == text


def test_report_says_what_is_wrong() -> None:
    def one(to: int, wrong: int) -> list[Shift]:
        return [Shift(to, wrong, 123.45, 2.5, mapped=to == 1)]

    text, good = report([one(1, 0), one(0, 0)], "ibgda")
    assert good and "values: all correct" in text
    lines = [line.split() for line in text.splitlines()]
    assert ["0", "-", "P2P"] in lines and ["1", "ibgda", "-"] in lines and ["0", "-", "123.5"] in lines
    text, good = report([one(1, 0), one(0, 7)], "ibgda")
    assert not good and "7 words of 8 bytes were wrong" in text
