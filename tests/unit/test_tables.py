"""Tensors of plans by name (backends/tables.py)."""

from __future__ import annotations

import pytest
import torch

from deepep_moe.backends.tables import Tables

CPU = torch.device("cpu")


def test_tensors_of_one_allocation_do_not_overlap() -> None:
    tables = Tables(CPU)
    int64, int32 = {"a": (2, 3), "none": (0, 4)}, {"b": (5,), "c": (1, 2, 2), "d": ()}
    tables.allocate(int64, int32)
    for number, (name, shape) in enumerate({**int64, **int32}.items()):
        tensor = tables.tensor(name)
        assert (tuple(tensor.shape), tensor.dtype) == (shape, torch.int64 if name in int64 else torch.int32)
        assert tensor.is_contiguous() and tensor.data_ptr() % tensor.element_size() == 0
        assert tensor.numel() == 0 or tables.address(name) == tensor.data_ptr()
        tensor.fill_(number)
    for number, name in enumerate((*int64, *int32)):
        assert tables.tensor(name).eq(number).all(), name
    assert tables.tensor("b") is tables.tensor("b")


def test_a_part_of_a_tensor_has_a_name_of_its_own() -> None:
    tables = Tables(CPU)
    tables.allocate({"before": (3,), "all": (10,)}, {})
    tables.name_part("part", "all", 2, (2, 3))
    tables.tensor("all").copy_(torch.arange(10))
    assert tables.tensor("part").tolist() == [[2, 3, 4], [5, 6, 7]]
    assert tables.addresses("part") == {"part": tables.address("all") + 16}


def test_memory_covers_all_tensors_without_creating_them() -> None:
    tables = Tables(CPU)
    tables.allocate({"a": (2, 3)}, {"b": (5,)})
    tables.allocate({}, {"c": (4,)})
    rows = torch.zeros((3, 4), dtype=torch.int32, device=CPU)
    tables.put(rows=rows)
    assert [tensor.numel() for tensor in tables.memory] == [2 * 6 + 5, 4, 12]
    assert tables.memory[2] is rows
    storages = [tensor.untyped_storage().data_ptr() for tensor in tables.memory]
    for name, number in (("a", 0), ("b", 0), ("c", 1), ("rows", 2)):
        assert tables.tensor(name).untyped_storage().data_ptr() == storages[number], name
    assert len(tables.memory) == 3


def test_kernels_get_addresses_of_contiguous_tensors_only() -> None:
    tables = Tables(CPU)
    table = torch.zeros((3, 4), dtype=torch.int32)
    tables.put(rows=table[1:], columns=table[:, 1:])
    assert tables.addresses("rows") == {"rows": table.data_ptr() + 16}
    with pytest.raises(AssertionError, match="columns"):
        tables.address("columns")
    with pytest.raises(KeyError, match="unknown"):
        tables.tensor("unknown")
