"""The kernels of csrc/local that make a plan, in NumPy on CPU memory, so that ``CollectiveOnGPU`` runs over gloo.

What they take and write is said in csrc/local/args.h. tests/gpu/test_collective.py compares the real ones with the
reference. Rows are moved by PyTorch's operators (backends/local.py), which need no kernel.
"""

from __future__ import annotations

import ctypes
import math
import time
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from deepep_moe import extension
from deepep_moe.backends.exchange import Exchange, Transfer
from deepep_moe.backends.headers import HEADER_WORDS

ROUTE_WORDS = 4  # of the header: the lowest and highest expert index, the limits


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the collective backend use these kernels on the CPU."""
    kernels = (count, announce, starts, place)
    monkeypatch.setattr(extension, "_C", SimpleNamespace(Messages=Messages, **{k.__name__: k for k in kernels}))
    monkeypatch.setattr(extension, "current_stream", lambda device: 0)


def wait_where_sizes_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let transfers over gloo, which would end the process, wait where ranks send and expect different sizes, as NCCL
    does: until the group is given up."""
    transfer = Exchange.transfer

    def bounded(self: Exchange, phase: str, transfers: list[Transfer]) -> None:
        for moved in transfers:
            width = moved.rows.element_size() * math.prod(moved.rows.shape[1:])
            sent = torch.tensor(moved.send_counts).unsqueeze(1) * width
            expected, ones = torch.empty_like(sent), [1] * self.world_size
            transfer(self, phase, [Transfer(sent, ones, ones, expected)])
            if expected.flatten().tolist() == [count * width for count in moved.recv_counts]:
                transfer(self, phase, [moved])
                continue
            while self.usable:
                time.sleep(0.005)
            if phase == "plan":  # in the others the host does not wait
                self.check_usable(phase)
            return

    monkeypatch.setattr(Exchange, "transfer", bounded)


class Messages(NamedTuple):
    data: int
    num_ranks: int
    expert_words: int
    row_words: int

    @property
    def array(self) -> np.ndarray:
        words = HEADER_WORDS + ROUTE_WORDS + self.num_ranks + self.expert_words + self.row_words
        return at(self.data, np.int64, self.num_ranks, words)

    @property
    def tokens(self) -> np.ndarray:
        first = HEADER_WORDS + ROUTE_WORDS
        return self.array[:, first : first + self.num_ranks]

    @property
    def routes(self) -> np.ndarray:
        first = HEADER_WORDS + ROUTE_WORDS + self.num_ranks
        return self.array[:, first : first + self.expert_words]

    def rows(self, rank: int, topk: int) -> np.ndarray:
        """[room, 1 + K]: the token and the experts of each row."""
        first = HEADER_WORDS + ROUTE_WORDS + self.num_ranks + self.expert_words
        room = 2 * self.row_words // (1 + topk)
        return self.array[rank, first:].view(np.int32)[: room * (1 + topk)].reshape(room, 1 + topk)


def at(address: int, dtype: Any, *shape: int) -> np.ndarray:
    """The array at ``address``."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    if size == 0:
        return np.empty(shape, dtype)
    return np.frombuffer((ctypes.c_char * size).from_address(address), dtype).reshape(shape)


def count(
    *,
    topk_idx: int,
    given_membership: int,
    given_expert_counts: int,
    num_tokens: int,
    num_topk: int,
    num_experts: int,
    max_recv: int,
    max_rows: int,
    header: list[int],
    messages: Messages,
    send_slot: int,
    stream: int,
) -> None:
    ranks, local = messages.num_ranks, num_experts // messages.num_ranks
    index = at(topk_idx, np.int64, num_tokens, num_topk)
    valid = (index >= 0) & (index < num_experts)
    wanted = at(given_membership, np.bool_, num_tokens, ranks) if num_topk == 0 else None
    slots = at(send_slot, np.int32, num_tokens, ranks)
    messages.array[:, :HEADER_WORDS] = header
    messages.array[:, HEADER_WORDS] = index.min() if index.size else -1
    messages.array[:, HEADER_WORDS + 1] = index.max() if index.size else -1
    messages.array[:, HEADER_WORDS + 2 : HEADER_WORDS + 4] = max_recv, max_rows
    for rank in range(ranks):
        goes = (valid & (index // local == rank)).any(1) if wanted is None else wanted[:, rank]
        slots[:, rank] = np.where(goes, goes.cumsum() - 1, -1)
        messages.tokens[:, rank] = goes.sum()
        rows = messages.rows(rank, num_topk)
        sent = np.flatnonzero(goes)[: len(rows)]
        rows[: len(sent)] = np.column_stack([sent, index[sent]])
    if num_experts <= messages.routes.shape[1]:
        given = None if num_topk else at(given_expert_counts, np.int32, num_experts)
        counts = np.bincount(index[valid], minlength=num_experts) if given is None else given
        messages.routes[:, :num_experts] = counts


def announce(*, header: list[int], num_ranks: int, out: int, stream: int) -> None:
    both = at(out, np.int64, 2 * num_ranks, HEADER_WORDS)
    both[:num_ranks] = header
    both[num_ranks:] = -np.arange(num_ranks)[:, None] - 1


def starts(*, messages: Messages, rank: int, starts: int, stream: int) -> None:
    sent = messages.tokens[rank].copy()
    own, sent[rank] = int(sent[rank]), 0
    first = at(starts, np.int32, 2, messages.num_ranks)
    first[0] = np.cumsum(sent) - sent
    first[0, rank] = sent.sum()
    first[1] = first[0] + own
    first[1, rank] = 0


def place(
    *,
    messages: Messages,
    num_received: int,
    max_recv: int,
    max_rows: int,
    num_topk: int,
    local_experts: int,
    alignment: int,
    rank: int,
    counted: int,
    received: int,
    row_recv: int,
    stream: int,
) -> None:
    ranks = messages.num_ranks
    rows = np.concatenate([messages.rows(r, num_topk)[: messages.tokens[r, rank]] for r in range(ranks)])
    assert len(rows) == num_received
    counts = messages.routes[:, rank * local_experts :][:, :local_experts].sum(0)
    padded = -(-counts // alignment) * alignment * (num_topk > 0)
    offsets = np.concatenate([[0], padded.cumsum()])
    at(counted, np.int64, ranks * ranks + 2 * local_experts + 1)[:] = np.concatenate(
        [messages.tokens.cumsum(0).reshape(-1), counts, offsets]
    )
    words, back = at(received, np.int32, max_recv, 1 + 2 * num_topk), at(row_recv, np.int32, max_rows)
    words[:], back[:] = -1, -1
    words[:num_received, 0] = rows[:, 0]
    following = offsets.copy()
    for n in range(num_received):
        for k in range(num_topk):
            expert = rows[n, 1 + k] - rank * local_experts
            if 0 <= expert < local_experts:
                words[n, 1 + k], words[n, 1 + num_topk + k] = expert, following[expert]
                back[following[expert]] = n
                following[expert] += 1


def bits(x: Tensor | None) -> Tensor | None:
    """For comparisons of every dtype, NaN included."""
    return None if x is None else x.contiguous().view(torch.uint8) if x.numel() else x
