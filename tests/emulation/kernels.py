"""``_C.NodeMap`` with the kernels of csrc/nodes compiled for the CPU, so that ``hierarchical`` uses them over gloo."""

from __future__ import annotations

import ctypes
import os
from collections import Counter
from types import SimpleNamespace

import pytest

from deepep_moe import extension
from deepep_moe.backends import hierarchical_geometry

LIBRARY = "DEEPEP_MOE_TEST_NODE_KERNELS"
"""The environment variable with the path of the compiled kernels."""
_MAP = (
    "node_of place_of rail_members rail_nodes rail_before runs num_ranks num_nodes node_size rank node place rail_rank"
)
_NUMBERS = {
    "summarize": "topk_idx num_tokens num_topk num_experts max_recv max_rows messages experts room send_slot "
    "send_position",
    "digest": "messages experts room alignment most_tokens found counted moved rail_tokens bad",
    "batch": "messages experts message_room bad room num_topk routes recv_position",
    "place": "messages experts message_room node_received node_counted moved num_recv num_rows room num_topk received "
    "row_recv arrived",
    "parts": "num_tokens num_recv num_topk room chunks exact most_of_share by_expert sent received rail_tokens "
    "send_position recv_position slots node_counted counted_size experts experts_stride arrived counted batch_counts "
    "arrived_counts no_padding chunk_slots placed own_slots send_moves recv_moves recv_starts send_used recv_used "
    "send_rows home_rows",
}
launched: Counter[str] = Counter()


class NodeMap:
    """Methods take the arguments of those of ``_C.NodeMap``."""

    def __init__(self, **numbers: int) -> None:
        self._library = ctypes.CDLL(os.environ[LIBRARY])
        self._map = _array([numbers.pop(name) for name in _MAP.split()])
        assert not numbers

    def _launch(self, kernel: str, stream: int, header: list[int] | None = None, **numbers: int) -> None:
        launched[kernel] += 1
        values = _array([numbers.pop(name) for name in _NUMBERS[kernel].split()])
        assert not numbers
        getattr(self._library, kernel)(self._map, values, *([] if header is None else [_array(header)]))

    def summarize(self, **arguments: int) -> None:
        self._launch("summarize", **arguments)

    def digest(self, **arguments: int) -> None:
        self._launch("digest", **arguments)

    def batch(self, **arguments: int) -> None:
        self._launch("batch", **arguments)

    def place(self, **arguments: int) -> None:
        self._launch("place", **arguments)

    def parts(self, **arguments: int) -> None:
        self._launch("parts", **arguments)


def _array(values: list[int]) -> ctypes.Array[ctypes.c_int64]:
    return (ctypes.c_int64 * len(values))(*(int(value) for value in values))


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let plans over several nodes use these kernels on the CPU."""
    monkeypatch.setattr(extension, "current_stream", lambda device: 0)
    monkeypatch.setattr(hierarchical_geometry, "why_not_on", lambda device: None)
    monkeypatch.setattr(hierarchical_geometry, "_C", SimpleNamespace(NodeMap=NodeMap))
