"""The protocol of low-latency engines: the calls they execute, the formats of rows, and the methods they have."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from deepep_moe.errors import DeepEPMoEError, InputError


class Half(enum.IntFlag):
    """The part of a call to execute: a call with a hook has two halves. (The extension's values.)"""

    TABLES = 1
    ROWS = 2
    SEND = 3
    RECEIVE = 4
    BOTH = 7


class Format(enum.IntEnum):
    """The format in which rows are sent and arrive."""

    BF16 = 0
    FP8 = 1
    """e4m3 with one fp32 scale per 128 channels."""
    FP8_ROUNDED = 2
    """The same, scales rounded up to powers of two."""
    FP8_UE8M0 = 3
    """As FP8_ROUNDED, but only the exponents of the scales are returned, four in an int32."""

    @classmethod
    def of(cls, use_fp8: bool, round_scale: bool, use_ue8m0: bool) -> Format:
        """The format that DeepEP's three switches select; without ``use_fp8`` the others have no effect."""
        if not use_fp8:
            return cls.BF16
        if use_ue8m0 and not round_scale:
            raise InputError("use_ue8m0", True, "needs round_scale: exponents say powers of two only")
        return cls.FP8_UE8M0 if use_ue8m0 else cls.FP8_ROUNDED if round_scale else cls.FP8


@dataclass(eq=False, slots=True)
class DispatchShape:
    """Values that all dispatches with equal shapes and dtypes share, computed after the checks have passed once."""

    tokens: int
    topk: int
    hidden: int
    num_experts: int
    max_tokens: int
    format: Format
    ranks: int
    local_experts: int
    slots: int
    """R * M: maximum rows of an expert."""
    wide_idx: bool
    """Whether the expert indices are int64."""
    rows: Tensor
    """This and the next three have no memory: outputs are allocated like them, which is faster than from sizes."""
    out: Tensor
    scales: Tensor | None
    memory: Tensor
    ranges_at: int
    """Position in :attr:`DispatchCall.memory`, in int32 words, of ``layout_range``; the others likewise."""
    src_info_at: int
    counts_at: int
    combines: set[object] = field(default_factory=set)
    """Signatures of combine arguments that have passed the checks."""
    launch: Any = None
    """Constant kernel arguments; private to the engine."""


@dataclass(eq=False, slots=True)
class DispatchCall:
    """One dispatch: its inputs, its outputs, and what its combine needs."""

    shape: DispatchShape
    x: Tensor
    """[T, H] bf16."""
    topk_idx: Tensor
    """[T, K] int32 or int64."""
    rows: Tensor
    """[L, R * M, H] bf16 or e4m3."""
    scales: Tensor | None
    """[L, R * M, S] fp32 or int32, tokens contiguous."""
    memory: Tensor
    """int32, 1-D: words for the engine, ``layout_range``, ``src_info`` and ``counts``, in one allocation."""
    counts: Tensor
    """[L] int32."""
    stats: Tensor | None
    """[L] int32, added to."""
    wait_stats: Tensor | None
    """[R] int64 nanoseconds, added to."""
    sent: bool = False
    """Whether the sending half has been enqueued; set by the engine."""
    received: bool = False
    """Whether the receiving half has been enqueued."""
    state: Any = None
    """Private to the reference engine: where each token's rows went."""

    @property
    def src_info(self) -> Tensor:
        """[L, R * M] int32: index of the token at its source."""
        shape = self.shape
        return self.memory.as_strided((shape.local_experts, shape.slots), (shape.slots, 1), shape.src_info_at)

    @property
    def layout_range(self) -> Tensor:
        """[L, R] int64: first row << 32 | rows."""
        shape = self.shape
        words = self.memory[shape.ranges_at : shape.src_info_at]
        return words.view(torch.int64).view(shape.local_experts, shape.ranks)


@dataclass(eq=False, slots=True)
class CombineCall:
    """One combine."""

    x: Tensor
    """[L, R * M, H] bf16."""
    topk_idx: Tensor
    """[T, K]: the indices of the dispatch, in which entries may have been replaced by -1."""
    topk_weights: Tensor
    """[T, K] float32."""
    dispatched: DispatchCall
    out: Tensor
    """[T, H] bf16."""
    wait_stats: Tensor | None
    """[R] int64 nanoseconds, added to."""
    sent: bool = False
    """Whether the sending half has been enqueued; set by the engine."""
    state: Any = None
    """Private to the engine."""


class Engine(Protocol):
    """Moves rows. All methods except those for masks are collective and enqueue on the current stream."""

    name: str

    def state_words(self, max_tokens: int, topk: int) -> int:
        """int32 words that the engine needs in :attr:`DispatchCall.memory`."""

    def signature(self, *tensors: Tensor | None) -> object:
        """What the checks examine of four or five arguments, to remember that they have passed.

        None: they must be checked in every call.
        """

    def dispatch(self, call: DispatchCall, half: Half) -> None: ...
    def combine(self, call: CombineCall, half: Half) -> None: ...
    def refuse_dispatch(self, max_tokens: object, hidden: int, problem: DeepEPMoEError) -> bool:
        """Take part in a dispatch without tokens, to tell the other ranks that this rank refused its arguments.

        Args:
            max_tokens: num_max_dispatch_tokens_per_rank, which may be what is wrong.
            hidden: hidden size, 0 if unknown.
            problem: the error that the caller raises afterwards.

        Returns:
            Whether this was a call, which uses memory in its turn.
        """

    def refuse_combine(self, call: DispatchCall | None, problem: DeepEPMoEError) -> bool:
        """The same for a combine; ``call``: its dispatch, if known."""

    def update_mask(self, rank: int, masked: bool) -> None: ...
    def query_mask(self, status: Tensor) -> None: ...
    def clean_mask(self) -> None: ...
    def check(self) -> None:
        """Raise the first problem reported so far, if any."""

    def close(self) -> None: ...
