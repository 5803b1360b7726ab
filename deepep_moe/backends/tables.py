"""The small tensors of a plan by name. Tensor objects are created on first access.

Most of these tensors are read by kernels only, which take addresses, and creating a tensor object takes the host about
as long as launching a kernel.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod

import torch
from torch import Tensor

from deepep_moe.extension import current_stream

_Shapes = Mapping[str, tuple[int, ...]]


class Tables:
    """Tensors on ``device`` by name.

    Args:
        made_here: the current stream writes them. False: any stream may have.
    """

    def __init__(self, device: torch.device, *, made_here: bool = True) -> None:
        self._device = device
        self._tensors: dict[str, Tensor] = {}
        self.memory: list[Tensor] = []
        """The allocations, and the tensors of :meth:`put`."""
        self._places: dict[str, tuple[int, int, tuple[int, ...], torch.dtype]] = {}
        """Of each allocated tensor: index into ``memory``, first word of 4 bytes there, shape, dtype."""
        self._addresses: dict[str, int] = {}
        self._streams = {current_stream(device)} if made_here and device.type == "cuda" else set()

    def allocate(self, int64: _Shapes, int32: _Shapes) -> None:
        """Allocate uninitialised tensors of these shapes, one after the other in one allocation."""
        number, words = len(self.memory), 0
        for name, shape in int64.items():
            self._places[name] = (number, words, shape, torch.int64)
            words += 2 * prod(shape)
        for name, shape in int32.items():
            self._places[name] = (number, words, shape, torch.int32)
            words += prod(shape)
        memory = torch.empty_strided((words,), (1,), dtype=torch.int32, device=self._device)
        self.memory.append(memory)
        base, addresses, places = memory.data_ptr(), self._addresses, self._places
        for shapes in (int64, int32):
            for name in shapes:
                addresses[name] = base + 4 * places[name][1]

    def name_part(self, name: str, of: str, first: int, shape: tuple[int, ...]) -> None:
        """Name the elements of tensor ``of`` from ``first`` on, as a tensor of this shape."""
        number, word, _, dtype = self._places[of]
        self._places[name] = (number, word + first * dtype.itemsize // 4, shape, dtype)
        self._addresses[name] = self._addresses[of] + first * dtype.itemsize

    def put(self, **tensors: Tensor) -> None:
        """Add tensors that exist already."""
        self._tensors.update(tensors)
        self.memory += tensors.values()

    def tensor(self, name: str) -> Tensor:
        tensor = self._tensors.get(name)
        if tensor is None:
            number, word, shape, dtype = self._places[name]
            tensor = self.memory[number][word : word + prod(shape) * dtype.itemsize // 4]
            if dtype == torch.int64:
                tensor = tensor.view(torch.int64)
            if len(shape) != 1:
                tensor = tensor.view(shape)
            self._tensors[name] = tensor
        return tensor

    def address(self, name: str) -> int:
        """Address of the first element, for kernels."""
        address = self._addresses.get(name)
        if address is None:
            tensor = self._tensors[name]
            assert tensor.is_contiguous(), name
            address = self._addresses[name] = tensor.data_ptr()
        return address

    def addresses(self, *names: str) -> dict[str, int]:
        """Addresses as keyword arguments."""
        known = self._addresses
        return {name: known[name] if name in known else self.address(name) for name in names}

    def on_new_stream(self) -> torch.cuda.Stream | None:
        """Record the current stream as a user of the tensors (``Tensor.record_stream``), and return it; None if it is
        one already."""
        if self._device.type == "cpu" or (address := current_stream(self._device)) in self._streams:
            return None
        self._streams.add(address)
        stream = torch.cuda.current_stream(self._device)
        for tensor in self.memory:
            tensor.record_stream(stream)
        return stream
