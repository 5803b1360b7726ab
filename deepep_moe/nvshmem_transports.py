"""Which transport NVSHMEM would use between two nodes, from what each node has, and what is missing for a better one.

Nothing is started: the answer follows from devices, drivers and environment variables, as NVSHMEM 3.4 chooses. What a
running job uses is measured by ``python -m deepep_moe nvshmem``.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from deepep_moe.topology import host_id

_VARIABLES = (
    "NVSHMEM_REMOTE_TRANSPORT",
    "NVSHMEM_IB_ENABLE_IBGDA",
    "NVSHMEM_IBGDA_NIC_HANDLER",
    "NVSHMEM_LIBFABRIC_PROVIDER",
    "NVSHMEM_DISABLE_P2P",
    "NVSHMEM_HCA_LIST",
)
_TRANSPORTS = {"ibrc": "IBRC", "ibdevx": "IBDEVX", "ucx": "UCX", "libfabric": "libfabric", "none": "none"}
"""Between nodes, by the values of NVSHMEM_REMOTE_TRANSPORT; IBGDA comes on top of them."""
_ON = ("1", "true", "yes", "on", "y", "t")


@dataclass(frozen=True)
class NodeFacts:
    """What one node has, as far as NVSHMEM's choice depends on it."""

    host: str
    nics: Mapping[str, str] = field(default_factory=dict)
    """Kernel driver of each RDMA device, by the device's name: mlx5_core, efa, ..."""
    gpu_memory_to_nic: bool = False
    """Whether NICs reach GPU memory: nvidia_peermem is loaded, or the kernel exports it as DMA-BUF."""
    gdrcopy: bool = False
    """Whether the GDRCopy driver and library are there: signals over libfabric need it."""
    gpu_rings_nic: bool = False
    """Whether the NVIDIA driver lets a GPU write NIC registers (PeerMappingOverride=1): IBGDA's fastest mode."""
    libfabric: bool = False
    libibverbs: bool = False
    variables: Mapping[str, str] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """For JSON; ``NodeFacts(**...)`` is the inverse."""
        return asdict(self)


def look(root: str = "/", environment: Mapping[str, str] = os.environ) -> NodeFacts:
    """The facts of this node.

    Args:
        root: where /sys, /proc and /dev are, for tests.
        environment: of the process that would start NVSHMEM.
    """
    base = Path(root)
    nics = {}
    for device in sorted((base / "sys/class/infiniband").glob("*")):
        driver = device / "device/driver"
        nics[device.name] = os.path.basename(os.path.realpath(driver)) if driver.exists() else "unknown"
    peermem = any(
        (base / place).exists()
        for place in (
            "sys/module/nvidia_peermem",
            "sys/kernel/mm/memory_peers/nvidia-peermem",
            "sys/module/nv_peer_mem",
        )
    )
    driver_settings = _text(base / "proc/driver/nvidia/params")
    open_driver = "Open Kernel Module" in _text(base / "proc/driver/nvidia/version")  # it exports DMA-BUF
    return NodeFacts(
        host=host_id(),
        nics=nics,
        gpu_memory_to_nic=peermem or open_driver,
        gdrcopy=(base / "dev/gdrdrv").exists() and _loads("libgdrapi.so.2", "libgdrapi.so"),
        gpu_rings_nic="PeerMappingOverride=1" in driver_settings,
        libfabric=_loads("libfabric.so.1", "libfabric.so"),
        libibverbs=_loads("libibverbs.so.1", "libibverbs.so"),
        variables={name: environment[name] for name in _VARIABLES if environment.get(name)},
    )


def expected(a: NodeFacts, b: NodeFacts) -> tuple[str, list[str]]:
    """The transport between two nodes, and what is missing for it to work, or to be faster.

    Returns:
        One of "P2P", "IBGDA", "IBRC", "IBDEVX", "UCX", "libfabric", "none", and short sentences.
    """
    if a.host == b.host and not any(_is_on(node, "NVSHMEM_DISABLE_P2P") for node in (a, b)):
        return "P2P", []
    chosen = {node.variables.get("NVSHMEM_REMOTE_TRANSPORT", "ibrc").lower() for node in (a, b)}
    if len(chosen) > 1:
        return "none", [f"NVSHMEM_REMOTE_TRANSPORT differs: {', '.join(sorted(chosen))}"]
    (transport,) = chosen
    if transport not in _TRANSPORTS:
        return "none", [f"NVSHMEM_REMOTE_TRANSPORT={transport}: allowed is one of {', '.join(_TRANSPORTS)}"]
    if transport == "none":
        return "none", ["NVSHMEM_REMOTE_TRANSPORT=none: unset it where there is an RDMA NIC"]
    if not (a.nics and b.nics):
        return "none", ["no RDMA NIC (nothing in /sys/class/infiniband): use rail=nccl"]
    missing = []
    if not (a.gpu_memory_to_nic and b.gpu_memory_to_nic):
        missing.append("NICs do not reach GPU memory: load nvidia_peermem (modprobe nvidia_peermem)")
    if transport == "libfabric":
        return _libfabric(a, b, missing)
    drivers = {driver for node in (a, b) for driver in node.nics.values()}
    if drivers == {"efa"}:
        return "none", ["EFA: set NVSHMEM_REMOTE_TRANSPORT=libfabric and NVSHMEM_LIBFABRIC_PROVIDER=efa"]
    if not (a.libibverbs and b.libibverbs):
        return "none", [*missing, "libibverbs is not installed (package rdma-core)"]
    if transport != "ibrc":
        return _TRANSPORTS[transport], missing
    if not all(_is_on(node, "NVSHMEM_IB_ENABLE_IBGDA") for node in (a, b)):
        missing.append("a CPU thread posts transfers: set NVSHMEM_IB_ENABLE_IBGDA=1 to let the GPU do it")
        return "IBRC", missing
    if not any(driver.startswith("mlx5") for driver in drivers):
        return "IBRC", [*missing, f"IBGDA needs ConnectX NICs (mlx5), these are {', '.join(sorted(drivers))}"]
    if not (a.gpu_rings_nic and b.gpu_rings_nic):
        if any(node.variables.get("NVSHMEM_IBGDA_NIC_HANDLER", "auto") == "gpu" for node in (a, b)):
            return "IBRC", [*missing, "NVSHMEM_IBGDA_NIC_HANDLER=gpu needs the driver option PeerMappingOverride=1"]
        missing.append(
            "a CPU thread rings the NIC: driver option NVreg_RegistryDwords=PeerMappingOverride=1 lets the GPU do it"
        )
    return "IBGDA", missing


def _libfabric(a: NodeFacts, b: NodeFacts, missing: list[str]) -> tuple[str, list[str]]:
    if not (a.libfabric and b.libfabric):
        return "none", [*missing, "libfabric is not installed"]
    if not (a.gdrcopy and b.gdrcopy):
        return "none", [*missing, "GDRCopy is not there (driver gdrdrv and libgdrapi): signals over libfabric need it"]
    efa = any(driver == "efa" for node in (a, b) for driver in node.nics.values())
    if efa and any(node.variables.get("NVSHMEM_LIBFABRIC_PROVIDER") != "efa" for node in (a, b)):
        return "none", [*missing, "EFA: set NVSHMEM_LIBFABRIC_PROVIDER=efa"]
    return "libfabric", missing


def _is_on(node: NodeFacts, name: str) -> bool:
    return node.variables.get(name, "").lower() in _ON


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""


def _loads(*names: str) -> bool:
    for name in names:
        try:
            ctypes.CDLL(name)
        except OSError:
            continue
        return True
    return False


def summary(facts_of_nodes: list[NodeFacts]) -> tuple[str, list[str]]:
    """The transports between the nodes of a group, in a line, and what is missing, each once."""
    pairs: dict[str, list[str]] = {}
    missing: dict[str, None] = {}
    for a, one in enumerate(facts_of_nodes):
        for b in range(a + 1, len(facts_of_nodes)):
            transport, notes = expected(one, facts_of_nodes[b])
            pairs.setdefault(transport, []).append(f"{a}-{b}")
            missing.update(dict.fromkeys(notes))
    if len(pairs) == 1:
        return f"{next(iter(pairs))} between all nodes", list(missing)
    return "; ".join(f"{transport} between nodes {', '.join(names)}" for transport, names in pairs.items()), list(
        missing
    )
