"""Moving and summing rows on one rank: what surrounds a collective that carries packed rows between ranks.

A *packed row* is what crosses for one token and destination: the row, its scales and its weights, side by side in bytes
(:class:`RowFormat`). Three functions do all the work:

* :func:`pack_rows` copies each token to its places in a send buffer, quantised on the way if asked.
* :func:`expand_rows` copies each packed row that arrived to its places in the layout of a dispatch.
* :func:`sum_rows` sums, in fp32 and in a fixed order, the rows that belong together: a token's expert rows on the rank
  that computed them (into packed rows), and a token's packed rows at home.

*Places* say which rows belong together: ``[n, d]`` int32, entry ``[i, j]`` the row number of item i's j-th partner, -1
for none. With ``starts [d]`` int32, entries count from ``starts[j]``.

On a GPU that the CUDA extension serves each function is one kernel (csrc/local) and makes no host wait; elsewhere, and
for rows whose bytes are no multiple of 16, the same result comes from PyTorch's operators.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from deepep_moe import extension
from deepep_moe.backends.base import Layout, Rows
from deepep_moe.backends.exchange import as_bytes
from deepep_moe.extension import DTYPE_CODES, address, vector_padded
from deepep_moe.fp8 import BLOCK, dequantize_e4m3, quantize_e4m3

_MOST_SUMMED = 64  # rows of one item; csrc/local/args.h has kMaxSummedRows, biases included


class RowFormat:
    """What a packed row holds: ``hidden`` channels of ``dtype``, scales of 4 bytes, fp32 weights.

    The channels are padded to a multiple of 16 bytes, and so is the whole row.

    Attributes:
        dense_bytes: of the channels alone.
        row_bytes: where the scales begin.
        pitch: bytes from row to row.
    """

    __slots__ = ("dense_bytes", "dtype", "hidden", "num_scales", "num_weights", "pitch", "row_bytes", "scale_dtype")

    def __init__(
        self,
        dtype: torch.dtype,
        hidden: int,
        num_scales: int = 0,
        num_weights: int = 0,
        scale_dtype: torch.dtype = torch.float32,
    ) -> None:
        self.dtype, self.hidden, self.scale_dtype = dtype, hidden, scale_dtype
        self.num_scales, self.num_weights = num_scales, num_weights
        self.dense_bytes = hidden * dtype.itemsize
        self.row_bytes = vector_padded(self.dense_bytes)
        self.pitch = vector_padded(self.row_bytes + 4 * (num_scales + num_weights))

    @classmethod
    def of(cls, x: Tensor, scales: Tensor | None, weights: Tensor | None, *, quantize: bool = False) -> RowFormat:
        """The format of rows ``x [n, H]`` with ``scales [n, S]`` and ``weights [n, K]``.

        ``quantize``: they travel as e4m3 with one scale per 128 channels.
        """
        hidden, num_weights = x.shape[1], 0 if weights is None else weights.shape[1]
        if quantize:
            return cls(torch.float8_e4m3fn, hidden, hidden // BLOCK, num_weights)
        if scales is None:
            return cls(x.dtype, hidden, 0, num_weights)
        return cls(x.dtype, hidden, scales.shape[1], num_weights, scales.dtype)


class Segments(NamedTuple):
    """Which of the received rows, numbered in source order, never left this rank: ``num_own`` from ``own_first`` on.

    Rows in flight keep them apart, next to both what is sent and what is received, so that one buffer serves both::

        [ rows for other ranks, in rank order | own rows | rows from other ranks, in rank order ]

    What is packed is numbered from the start (own rows last), what is read from the first own row (own rows first).
    """

    own_first: int = 0
    num_own: int = 0

    def own_first_order(self, num_rows: int, device: torch.device) -> Tensor:
        """[num_rows] int64: where each row, in source order, is read."""
        rows = torch.arange(num_rows, dtype=torch.int64, device=device)
        before, own = rows < self.own_first, rows < self.own_first + self.num_own
        return torch.where(before, rows + self.num_own, torch.where(own, rows - self.own_first, rows))

    def own_last_order(self, num_rows: int, device: torch.device) -> Tensor:
        """[num_rows] int64: where each row, in source order, is written when it goes back."""
        rows = torch.arange(num_rows, dtype=torch.int64, device=device)
        before, own = rows < self.own_first, rows < self.own_first + self.num_own
        last = num_rows - self.num_own - self.own_first
        return torch.where(before, rows, torch.where(own, rows + last, rows - self.num_own))


NONE_OWN = Segments()


def pack_rows(
    x: Tensor,
    places: Tensor,
    out: Tensor,
    format: RowFormat,
    *,
    starts: Tensor | None = None,
    scales: Tensor | None = None,
    weights: Tensor | None = None,
) -> None:
    """Copy row i of ``x`` to the rows ``places[i]`` of ``out``, with its scales and weights beside it.

    Args:
        x: [n, H]; bf16 where ``format`` is e4m3 and x is not: then it is quantised on the way.
        places: [n, d] int32.
        out: [rows, format.pitch] uint8. Bytes between the parts of a row are left as they are.
        starts: [d] int32.
        scales: [n, S] of 4 bytes, any strides.
        weights: [n, K] fp32.
    """
    quantize = format.dtype != x.dtype
    if not _on_kernel(format, x.device):
        if quantize:
            x, scales = quantize_e4m3(x)
        item, entry = (places >= 0).nonzero(as_tuple=True)
        rows = places[item, entry].long() + (0 if starts is None else starts[entry].long())
        out[rows] = _packed(x, scales, weights, format)[item]
        return
    x = extension.aligned(x)
    weights = None if weights is None else weights.contiguous()
    extension._C.pack(
        x=x.data_ptr(),
        scales=_scales(scales),
        weights=address(weights),
        num_rows=x.shape[0],
        quantise=quantize,
        places=_places(places, starts),
        out=_packed_rows(out, format),
        stream=extension.current_stream(x.device),
    )


def expand_rows(
    packed: Tensor,
    format: RowFormat,
    num_received: int,
    num_out: int,
    *,
    layout: Layout,
    places: Tensor,
    row_recv: Tensor | None = None,
    segments: Segments = NONE_OWN,
    dequantize: bool = False,
    into: Rows | None = None,
    headers: Tensor | None = None,
) -> Rows:
    """Copy packed rows to the layout of a dispatch.

    Args:
        packed: [at least num_received, format.pitch] uint8, own rows first.
        num_received: rows that arrived.
        num_out: rows of the result: M, or N (at least ``num_received``).
        places: [N, K] int32 expert rows. In source order they only say which weights belong to this rank; the others
            become 0.
        row_recv: [M] int32 (expert layout), negative where a row is padding, which is zeroed. None: no row is.
        dequantize: e4m3 becomes bf16 again.
        into: outputs to write to instead of new ones; padding is left alone.
        headers: [R, words] int64 on the device. If they differ, the results are NaN.

    Returns:
        Rows of ``format.dtype`` (or bf16), scales if the format has any and they are not used up, weights likewise.
    """
    by_source = layout is Layout.BY_SOURCE
    with_scales = format.num_scales > 0 and not dequantize
    if into is None:
        dtype = torch.bfloat16 if dequantize else format.dtype
        into = Rows(
            _empty(dtype, packed, num_out, format.hidden),
            _empty(format.scale_dtype, packed, num_out, format.num_scales) if with_scales else None,
            _empty(torch.float32, packed, num_out, *([format.num_weights] if by_source else []))
            if format.num_weights
            else None,
        )
    else:
        row_recv = None
    if not _on_kernel(format, packed.device):
        _expand_by_operators(
            packed, format, num_received, places, row_recv, segments, dequantize, by_source, into, headers
        )
        return into
    extension._C.expand(
        rows=_packed_rows(packed, format),
        segments=extension._C.Segments(*segments),
        num_received=num_received,
        dequantise=dequantize,
        places=_no_places() if by_source else _places(places, None),
        row_recv=address(None if by_source else row_recv),
        owned=places.data_ptr() if by_source else 0,
        owned_stride=places.stride(0) if by_source else 0,
        num_out=num_out,
        out=into.x.data_ptr(),
        out_scales=_scales(into.scales),
        out_weights=address(into.weights),
        headers=_headers(headers),
        stream=extension.current_stream(packed.device),
    )
    return into


def sum_rows(
    rows: Tensor,
    places: Tensor | None,
    out: Tensor,
    format: RowFormat,
    num_items: int,
    *,
    segments: Segments = NONE_OWN,
    row_weights: Tensor | None = None,
    apply_weights: bool = False,
    vectors: Tensor | None = None,
) -> None:
    """Sum the ``rows`` of each item into a packed row, in fp32 and in the order of ``places``, rounded once.

    Args:
        rows: [m, H] of ``format.dtype``.
        places: [at least num_items, d] int32; column order is the order of the sum. None: item i is row i alone.
        out: [at least num_items, format.pitch] uint8, own rows last.
        num_items: how many sums.
        row_weights: [m] fp32, multiplied into the rows (``apply_weights``) or else stored beside the sum by place
            (``format.num_weights`` is d then).
        vectors: [m, format.num_weights] fp32, summed beside the rows.
    """
    if not _on_kernel(format, rows.device, 1 if places is None else places.shape[1]):
        if places is None:
            places = torch.arange(num_items, dtype=torch.int32, device=rows.device).unsqueeze(1)
        places = places[:num_items]
        sums = _sum_by_operators(rows, places, row_weights if apply_weights else None)
        carried = None
        if vectors is not None:
            carried = _sum_by_operators(vectors, places, None)
        elif row_weights is not None and not apply_weights:
            carried = row_weights.new_zeros(places.shape)
            carried[places >= 0] = row_weights[places[places >= 0].long()]
        out[segments.own_last_order(num_items, out.device)] = _packed(sums.to(rows.dtype), None, carried, format)
        return
    rows = extension.aligned(rows)
    row_weights, vectors = (None if t is None else t.contiguous() for t in (row_weights, vectors))
    extension._C.sum(
        x=rows.data_ptr(),
        pitch=format.row_bytes,
        row_bytes=format.row_bytes,
        dtype=DTYPE_CODES[rows.dtype],
        places=_no_places() if places is None else _places(places, None),
        num_items=num_items,
        bias=[],
        out=out.data_ptr(),
        out_pitch=format.pitch,
        segments=extension._C.Segments(*segments),
        row_weights=address(row_weights),
        apply_weights=apply_weights,
        vectors=address(vectors),
        vectors_pitch=4 * format.num_weights,
        out_vectors=out.data_ptr() + format.row_bytes if format.num_weights else 0,
        out_vectors_pitch=format.pitch,
        num_weights=format.num_weights,
        headers=_headers(None),
        stream=extension.current_stream(rows.device),
    )


def sum_packed_rows(
    packed: Tensor,
    places: Tensor,
    format: RowFormat,
    *,
    starts: Tensor | None = None,
    most: int | None = None,
    bias: tuple[Tensor, ...] = (),
    headers: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Sum the packed rows of each item, then biases, in fp32 and in the order of ``places``, rounded once.

    Args:
        packed: [m, format.pitch] uint8.
        places: [n, d] int32.
        starts: [d] int32.
        most: no item has more rows than this; None: d.
        bias: up to two [n, H] tensors of ``format.dtype``.
        headers: [R, words] int64 on the device. If they differ, the results are NaN.

    Returns:
        [n, H] of ``format.dtype``, and the sums of the weights [n, K] fp32 (None if the format has none).
    """
    num_items = places.shape[0]
    if not _on_kernel(format, packed.device, places.shape[1] if most is None else min(most, places.shape[1])):
        if starts is not None:
            places = torch.where(places >= 0, places + starts, -1)
        x, _, vectors = _columns(packed, format)
        total = _sum_by_operators(x, places, None)
        for added in bias:
            total += added.float()
        weights = None if vectors is None else _sum_by_operators(vectors, places, None)
        sums = Rows(total.to(format.dtype), None, weights)
        _spoil_where_headers_differ(sums, headers)
        return sums.x, sums.weights
    out = _empty(format.dtype, packed, num_items, format.hidden)
    out_weights = _empty(torch.float32, packed, num_items, format.num_weights) if format.num_weights else None
    bias = tuple(map(extension.aligned, bias))
    extension._C.sum(
        x=packed.data_ptr(),
        pitch=format.pitch,
        row_bytes=format.row_bytes,
        dtype=DTYPE_CODES[format.dtype],
        places=_places(places, starts),
        num_items=num_items,
        bias=[added.data_ptr() for added in bias],
        out=out.data_ptr(),
        out_pitch=format.row_bytes,
        segments=extension._C.Segments(0, 0),
        row_weights=0,
        apply_weights=False,
        vectors=packed.data_ptr() + format.row_bytes if format.num_weights else 0,
        vectors_pitch=format.pitch,
        out_vectors=address(out_weights),
        out_vectors_pitch=4 * format.num_weights,
        num_weights=format.num_weights,
        headers=_headers(headers),
        stream=extension.current_stream(packed.device),
    )
    return out, out_weights


# -- by PyTorch's operators ------------------------------------------------------------------------------------------


def _packed(x: Tensor, scales: Tensor | None, weights: Tensor | None, format: RowFormat) -> Tensor:
    """[n, format.pitch] uint8."""
    out = torch.zeros((x.shape[0], format.pitch), dtype=torch.uint8, device=x.device)
    end = 0
    for part, begin in ((x, 0), (scales, format.row_bytes), (weights, format.row_bytes + 4 * format.num_scales)):
        if part is not None:
            end = begin + part.shape[1] * part.element_size()
            out[:, begin:end] = as_bytes(part)
    return out


def _columns(packed: Tensor, format: RowFormat) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Rows, scales and weights of packed rows."""
    ends = [format.row_bytes + 4 * format.num_scales, format.row_bytes + 4 * (format.num_scales + format.num_weights)]
    x = packed[:, : format.dense_bytes].contiguous().view(format.dtype)
    scales = packed[:, format.row_bytes : ends[0]].contiguous().view(format.scale_dtype)
    weights = packed[:, ends[0] : ends[1]].contiguous().view(torch.float32)
    return x, scales if format.num_scales else None, weights if format.num_weights else None


def _expand_by_operators(
    packed: Tensor,
    format: RowFormat,
    num_received: int,
    places: Tensor,
    row_recv: Tensor | None,
    segments: Segments,
    dequantize: bool,
    by_source: bool,
    out: Rows,
    headers: Tensor | None,
) -> None:
    x, scales, weights = _columns(packed[segments.own_first_order(num_received, packed.device)], format)
    if dequantize:
        assert scales is not None
        x, scales = dequantize_e4m3(x, scales, torch.bfloat16), None
    places = places[:num_received]
    source: Any
    rows: Any
    padding: Any
    if by_source:
        source, rows, padding = slice(None), slice(0, num_received), slice(num_received, None)
        weights = None if weights is None else torch.where(places >= 0, weights, 0.0)
    else:
        source, route = (places >= 0).nonzero(as_tuple=True)
        rows = places[source, route].long()
        padding = slice(0, 0) if row_recv is None else (row_recv < 0).nonzero()[:, 0]
        weights = None if weights is None else weights[source, route]
    for target, values in ((out.x, x[source]), (out.scales, None if scales is None else scales[source])):
        if target is not None:
            assert values is not None
            as_bytes(target)[rows] = as_bytes(values)
            as_bytes(target)[padding] = 0
    if out.weights is not None:
        assert weights is not None
        out.weights[rows] = weights
        out.weights[padding] = 0.0
    _spoil_where_headers_differ(out, headers)


def _sum_by_operators(rows: Tensor, places: Tensor, row_weights: Tensor | None) -> Tensor:
    """[n, H] fp32."""
    total = torch.zeros((places.shape[0], rows.shape[1]), dtype=torch.float32, device=rows.device)
    for column in places.unbind(1):
        used = (column >= 0).nonzero()[:, 0]
        source = column[used].long()
        addend = rows[source].float()
        if row_weights is not None:
            addend *= row_weights[source].unsqueeze(1)
        total.index_add_(0, used, addend)
    return total


def _spoil_where_headers_differ(out: Rows, headers: Tensor | None) -> None:
    if headers is None:
        return
    differ = (headers != headers[0]).any()
    for part in out:
        if part is not None:
            as_bytes(part).masked_fill_(differ, 255)


# -- arguments of kernels --------------------------------------------------------------------------------------------


def _on_kernel(format: RowFormat, device: torch.device, num_summed: int = 0) -> bool:
    return (
        format.dense_bytes == format.row_bytes and num_summed <= _MOST_SUMMED and extension.why_not_on(device) is None
    )


def _places(places: Tensor, starts: Tensor | None) -> extension._C.Places:
    assert places.dtype == torch.int32 and (places.stride(1) == 1 or places.shape[1] <= 1)
    return extension._C.Places(places.data_ptr(), places.shape[1], places.stride(0), address(starts))


def _no_places() -> extension._C.Places:
    """Row i belongs to item i."""
    return extension._C.Places(0, 1, 0, 0)


def _packed_rows(packed: Tensor, format: RowFormat) -> extension._C.PackedRows:
    assert packed.dtype == torch.uint8 and packed.shape[1] == format.pitch and packed.stride(0) == format.pitch
    return extension._C.PackedRows(
        packed.data_ptr(), format.pitch, format.row_bytes, format.num_scales, format.num_weights
    )


def _scales(scales: Tensor | None) -> extension._C.Scales:
    return extension._C.Scales(0, 0, 0) if scales is None else extension._C.Scales(scales.data_ptr(), *scales.stride())


def _headers(headers: Tensor | None) -> extension._C.Headers:
    return extension._C.Headers(0, 0) if headers is None else extension._C.Headers(headers.data_ptr(), len(headers))


def _empty(dtype: torch.dtype, like: Tensor, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=like.device)
