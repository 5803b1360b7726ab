"""Buffer: the DeepEP 1.x interface, so that programs written for DeepEP run unchanged.

A dispatch or combine moves rows in *rank layout* (see :mod:`deepep_moe.backends.base`): received rows are ordered by
source rank, then by source token, one row per token and not per expert. Differences from DeepEP:

* any number of ranks, tokens and channels; CPU groups (gloo) work too;
* the handle is a tuple with the same elements, but only the Buffer that made it accepts it;
* kernel chunk sizes (:class:`~deepep_moe.config.Config`) are accepted and ignored.

The low-latency calls are in low_latency_calls.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor

from deepep_moe import extension
from deepep_moe.backends import Backend, Layout, Plan, Rows, get_backend
from deepep_moe.backends.checks import check_integer, check_num_experts, check_shape, check_tensor, describe
from deepep_moe.config import Config, DispatcherConfig
from deepep_moe.errors import ConfigError, HandleError, InputError, UnsupportedError
from deepep_moe.events import EventHandle, EventOverlap, StreamRunner
from deepep_moe.low_latency_calls import LowLatencyCalls
from deepep_moe.low_latency_nodes import symmetric_bytes
from deepep_moe.shared import Shared

topk_idx_t = torch.int64
"""Dtype of expert indices that needs no conversion; int32 is accepted too."""

_MOST_BYTES = 2**63 - 1


class Handle(tuple):
    """The routing of a dispatch, for combine and for cached dispatches.

    The six elements, as in DeepEP: rank_prefix_matrix [R, R] int32; expert counts [L] int64; expert offsets [L + 1]
    int64; recv_src_idx [N] int32; is_token_in_rank [T, R] bool; send slots [T, R] int32.
    """

    plan: Plan
    owner: object

    @classmethod
    def of(cls, plan: Plan, is_token_in_rank: Tensor, owner: object) -> Handle:
        """The handle of ``plan`` for ``owner``, which identifies the Buffer."""
        handle = cls(
            (
                plan.rank_prefix.to(torch.int32),
                plan.expert_counts,
                plan.expert_offsets,
                plan.recv_src_idx.contiguous(),
                is_token_in_rank,
                plan.send_slot,
            )
        )
        handle.plan, handle.owner = plan, owner
        return handle


class Buffer(LowLatencyCalls, Shared):
    """Communication buffer of one expert-parallel group.

    Args:
        group: the process group. Its torch.distributed backend determines the device: CUDA with nccl, CPU with gloo.
        num_nvl_bytes, num_rdma_bytes: size of the memory that :meth:`get_local_buffer_tensor` returns. Staging memory
            is sized automatically; with ``rail=nvshmem`` it may take ``num_rdma_bytes`` or ``nvshmem_bytes``,
            whichever is larger. With ``num_rdma_bytes``, low-latency calls over several nodes use NVSHMEM whatever
            ``rail`` is.
        low_latency_mode: create the low-latency engine now; otherwise the first low-latency call creates it.
        explicitly_destroy: accepted for compatibility. :meth:`destroy` may be called in any case; otherwise garbage
            collection frees the same resources.
        enable_shrink: low-latency calls mask a rank that does not answer in time instead of failing.
        num_qps_per_rank, allow_nvlink_for_low_latency_mode, allow_mnnvl, use_fabric: accepted for compatibility.
        comm: an MPI communicator instead of ``group``; not supported.

    All other settings come from :meth:`DispatcherConfig.load`.

    Raises:
        InputError: an argument out of range, or a group without this process.
        UnsupportedError: ``comm`` was given, or the configured backend cannot run here.
    """

    num_sms: ClassVar[int] = 20
    _num_sms_chosen: ClassVar[bool] = False

    def __init__(
        self,
        group: dist.ProcessGroup | None,
        num_nvl_bytes: int = 0,
        num_rdma_bytes: int = 0,
        low_latency_mode: bool = False,
        num_qps_per_rank: int = 24,
        allow_nvlink_for_low_latency_mode: bool = True,
        allow_mnnvl: bool = False,
        use_fabric: bool = False,
        explicitly_destroy: bool = False,
        enable_shrink: bool = False,
        comm: Any = None,
    ) -> None:
        if comm is not None:
            raise UnsupportedError("comm: MPI communicators are not supported; pass a torch.distributed group")
        for name, value in (("num_nvl_bytes", num_nvl_bytes), ("num_rdma_bytes", num_rdma_bytes)):
            check_integer(name, value, most=_MOST_BYTES)
        config = replace(DispatcherConfig.load(), capacity_factor=0.0)  # here num_worst_tokens fixes sizes
        low_latency_sms = config.num_sms  # as in DeepEP, set_num_sms does not apply to low-latency calls
        if Buffer._num_sms_chosen:
            config = replace(config, num_sms=Buffer.num_sms)
        if config.rail == "nvshmem":
            config = replace(config, nvshmem_bytes=max(config.nvshmem_bytes, num_rdma_bytes))
        self._backend: Backend | None = get_backend(group, None, config)
        self.group = self._backend.group
        self.rank, self.group_size = self._backend.rank, self._backend.world_size
        self.num_nvl_bytes, self.num_rdma_bytes = num_nvl_bytes, num_rdma_bytes
        self.low_latency_mode = low_latency_mode
        self.explicitly_destroy = explicitly_destroy
        self._runner = StreamRunner(self._backend.device)
        self._local_memory: dict[bool, Tensor] = {}
        self._identity = object()  # identifies this buffer in its handles; unlike id(), never reused
        self.enable_shrink, self._low_latency_sms = enable_shrink, low_latency_sms
        if low_latency_mode:
            self._opened()

    # -- lifetime and settings -----------------------------------------------------------------------------------

    def destroy(self) -> None:
        """Release the backend. Idempotent; later calls, and uses of this buffer's handles, raise HandleError."""
        self._close_low_latency()
        self._backend = None
        self._local_memory.clear()

    @staticmethod
    def is_sm90_compiled() -> bool:
        """Whether the CUDA extension is installed and has code for sm_90 (Hopper) or later."""
        return any(int(arch.split(".")[0]) >= 9 for arch in extension.ARCHITECTURES)

    @staticmethod
    def set_num_sms(new_num_sms: int) -> None:
        """Set how many SMs the kernels of Buffers created from now on may use; an even number, as in DeepEP.

        Raises:
            ConfigError: not an integer, an odd number, or one below 2.
        """
        if isinstance(new_num_sms, bool) or not isinstance(new_num_sms, int) or new_num_sms < 2 or new_num_sms % 2:
            raise ConfigError(f"num_sms = {new_num_sms!r}: allowed is an even integer >= 2")
        Buffer.num_sms, Buffer._num_sms_chosen = new_num_sms, True

    @staticmethod
    def capture() -> EventOverlap:
        """An event recorded on the current stream, for ``previous_event``."""
        return EventOverlap(EventHandle())

    @staticmethod
    def get_dispatch_config(num_ranks: int) -> Config:
        """Accepted by :meth:`dispatch` and ignored; equal for every ``num_ranks`` >= 1."""
        return _default_config(num_ranks)

    @staticmethod
    def get_combine_config(num_ranks: int) -> Config:
        """Accepted by :meth:`combine` and ignored; see :meth:`get_dispatch_config`."""
        return _default_config(num_ranks)

    @staticmethod
    def get_low_latency_rdma_size_hint(
        num_max_dispatch_tokens_per_rank: int, hidden: int, num_ranks: int, num_experts: int
    ) -> int:
        """Symmetric memory that low-latency calls of this shape need on each GPU of a group on several nodes.

        Pass it as ``num_rdma_bytes``, or the sum for all shapes that are used. It is an upper bound, as if each rank
        had a node of its own. Over one node the calls allocate what they need in any case.
        """
        for name, value in (
            ("num_max_dispatch_tokens_per_rank", num_max_dispatch_tokens_per_rank),
            ("hidden", hidden),
            ("num_ranks", num_ranks),
        ):
            check_integer(name, value, least=1)
        check_num_experts(num_experts, num_ranks)
        return symmetric_bytes(int(num_max_dispatch_tokens_per_rank), int(hidden), int(num_ranks))

    def get_comm_stream(self) -> torch.cuda.Stream:
        """The stream that asynchronous calls run on. Raises UnsupportedError on a CPU."""
        self._open()
        return self._runner.stream

    def get_local_buffer_tensor(
        self, dtype: torch.dtype, size: Sequence[int] | None = None, offset: int = 0, use_rdma_buffer: bool = False
    ) -> Tensor:
        """Scratch memory of this rank, as a tensor.

        Args:
            dtype: of the result.
            size: shape of the result, a torch.Size or tuple; default: one dimension, up to the end of the memory.
            offset: first byte, a multiple of the size of ``dtype``.
            use_rdma_buffer: use the ``num_rdma_bytes`` instead of the ``num_nvl_bytes``.

        Raises:
            InputError: ``offset`` or ``size`` does not fit.
        """
        backend = self._open()
        if not isinstance(dtype, torch.dtype):
            raise InputError("dtype", repr(dtype), "must be a torch.dtype")
        check_integer("offset", offset, most=_MOST_BYTES)
        num_bytes = self.num_rdma_bytes if use_rdma_buffer else self.num_nvl_bytes
        if offset > num_bytes:
            raise InputError("offset", offset, f"must be within the buffer's {num_bytes} bytes")
        if use_rdma_buffer not in self._local_memory:
            self._local_memory[use_rdma_buffer] = torch.zeros(num_bytes, dtype=torch.uint8, device=backend.device)
        memory = self._local_memory[use_rdma_buffer][offset:]
        if offset % dtype.itemsize:
            raise InputError("offset", offset, f"must be a multiple of {dtype.itemsize} bytes, the size of {dtype}")
        tensor = memory[: len(memory) // dtype.itemsize * dtype.itemsize].view(dtype)
        if size is None:
            return tensor
        try:
            size = torch.Size(size)
        except TypeError:
            raise InputError("size", repr(size), "must be a torch.Size or a tuple of integers") from None
        if size.numel() > tensor.numel() or min(size, default=0) < 0:
            raise InputError("size", tuple(size), f"must have at most {tensor.numel()} elements of {dtype}")
        return tensor[: size.numel()].view(size)

    # -- the calls -----------------------------------------------------------------------------------------------

    def get_dispatch_layout(
        self,
        topk_idx: Tensor,
        num_experts: int,
        previous_event: EventOverlap | None = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor, EventOverlap]:
        """Count the destinations of this rank's tokens. Not collective.

        Args:
            topk_idx: [T, K] int32 or int64 experts, -1 = dropped route.
            num_experts: E, a multiple of R.
            previous_event, async_finish, allocate_on_comm_stream: see :meth:`dispatch`.

        Returns:
            num_tokens_per_rank [R] int32; num_tokens_per_rdma_rank [nodes] int32, None except on the hierarchical
            backend; num_tokens_per_expert [E] int32; is_token_in_rank [T, R] bool; the event.
        """
        backend = self._open()
        counts, event = self._runner.run(
            lambda: backend.destinations(topk_idx, num_experts),
            previous_event=previous_event,
            async_finish=async_finish,
            allocate_on_comm_stream=allocate_on_comm_stream,
            reads=(topk_idx,),
            made=lambda result: result,
        )
        return (*counts, event)

    def dispatch(
        self,
        x: Tensor | tuple[Tensor, Tensor],
        handle: Handle | None = None,
        num_tokens_per_rank: Tensor | None = None,
        num_tokens_per_rdma_rank: Tensor | None = None,
        is_token_in_rank: Tensor | None = None,
        num_tokens_per_expert: Tensor | None = None,
        topk_idx: Tensor | None = None,
        topk_weights: Tensor | None = None,
        expert_alignment: int = 1,
        num_worst_tokens: int = 0,
        config: Config | None = None,
        previous_event: EventOverlap | None = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple[
        Tensor | tuple[Tensor, Tensor], Tensor | None, Tensor | None, list[int] | None, Handle | None, EventOverlap
    ]:
        """Send each token once to every rank that owns one of its experts. Collective.

        Args:
            x: [T, H] bf16, fp16 or fp32, or (e4m3 [T, H], scales [T, H / 128] of any strides).
            handle: from an earlier dispatch: repeat its routing without exchanging it again.
            is_token_in_rank: [T, R] bool, from :meth:`get_dispatch_layout`; needed without ``handle``.
            num_tokens_per_expert: [E] int32, from there too; needed without ``handle``.
            num_tokens_per_rank: [R] int32, from there too; not needed. On a CPU these three are compared with
                ``topk_idx``; on a GPU that would make the host wait, and ``is_token_in_rank`` decides.
            num_tokens_per_rdma_rank, config: accepted for compatibility.
            topk_idx: [T, K] int32 or int64 experts, -1 = dropped route. None: ``is_token_in_rank`` decides.
            topk_weights: [T, K] float32, only together with ``topk_idx``.
            expert_alignment: the counts in the returned list are rounded up to a multiple of this.
            num_worst_tokens: if > 0, ``recv_x`` has this many rows and the host does not wait.
            previous_event: start after this event instead of after the work on the current stream.
            async_finish: do not make the current stream wait; wait for the returned event before using results.
            allocate_on_comm_stream: accepted together with the two above.

        Returns:
            recv_x [N, H] (or with scales); recv_topk_idx [N, K] local experts, -1 if the expert is on another rank;
            recv_topk_weights [N, K], 0 there; tokens of each local expert as a list, empty with
            ``num_worst_tokens``; the handle; the event. With ``handle``: (recv_x, None, None, None, None, event).

        Raises:
            InputError, HandleError: wrong arguments, or a handle of another or a destroyed buffer.
            RankMismatchError, PeerError: ranks disagree, or another rank refused its input or died.
        """
        backend = self._open()
        try:
            tokens, scales = tokens_and_scales(x)
            check_integer("num_worst_tokens", num_worst_tokens)
            check_integer("expert_alignment", expert_alignment, least=1)
            self._runner.check(previous_event, async_finish, allocate_on_comm_stream)
            if handle is not None:
                if topk_idx is not None or topk_weights is not None:
                    raise InputError("handle", "given", "a cached dispatch takes neither topk_idx nor topk_weights")
                plan = self._plan_of(handle)
            else:
                if is_token_in_rank is None or num_tokens_per_expert is None:
                    missing = "is_token_in_rank" if is_token_in_rank is None else "num_tokens_per_expert"
                    raise InputError(missing, None, "without a handle dispatch needs what get_dispatch_layout returned")
                check_tensor("is_token_in_rank", is_token_in_rank)
                check_shape("num_tokens_per_expert", num_tokens_per_expert, (None,), backend.device)
                if topk_weights is not None and topk_idx is None:
                    raise InputError("topk_weights", "given", "needs topk_idx")
                if topk_idx is not None and backend.device.type == "cpu":
                    _check_counts(backend, topk_idx, is_token_in_rank, num_tokens_per_expert, num_tokens_per_rank)
        except Exception as error:
            backend.refuse("plan" if handle is None else "dispatch", error)

        if handle is not None:
            rows, event = self._runner.run(
                lambda: backend.dispatch(plan, tokens, layout=Layout.BY_SOURCE, scales=scales),
                previous_event=previous_event,
                async_finish=async_finish,
                allocate_on_comm_stream=allocate_on_comm_stream,
                reads=(tokens, scales, *handle),
                made=lambda result: result,
            )
            return (rows.x if rows.scales is None else (rows.x, rows.scales)), None, None, None, None, event

        assert is_token_in_rank is not None and num_tokens_per_expert is not None
        routed, num_experts = is_token_in_rank, num_tokens_per_expert.shape[0]

        def call() -> tuple[Rows, Tensor | None, list[int], Handle]:
            """Creates everything that is returned, so that the event covers it."""
            plan = backend.plan(
                topk_idx,
                num_experts,
                alignment=expert_alignment,
                is_token_in_rank=routed,
                num_tokens_per_expert=num_tokens_per_expert,
                max_recv=num_worst_tokens or None,
            )
            rows = backend.dispatch(plan, tokens, layout=Layout.BY_SOURCE, scales=scales, weights=topk_weights)
            recv_topk_idx = None if topk_idx is None else plan.recv_topk_idx.to(topk_idx.dtype)
            counts: list[int] = []
            if plan.expert_counts_host is not None:
                counts = [-(-n // expert_alignment) * expert_alignment for n in plan.expert_counts_host.tolist()]
            return rows, recv_topk_idx, counts, Handle.of(plan, routed, self._identity)

        (rows, recv_topk_idx, counts, made), event = self._runner.run(
            call,
            previous_event=previous_event,
            async_finish=async_finish,
            allocate_on_comm_stream=allocate_on_comm_stream,
            reads=(tokens, scales, topk_idx, topk_weights, is_token_in_rank, num_tokens_per_expert),
            made=lambda result: (*result[0], result[1], *result[3], *result[3].plan.memory()),
        )
        received = rows.x if rows.scales is None else (rows.x, rows.scales)
        return received, recv_topk_idx, rows.weights, counts, made, event

    def combine(
        self,
        x: Tensor,
        handle: Handle,
        topk_weights: Tensor | None = None,
        bias: Tensor | tuple[Tensor, Tensor] | None = None,
        config: Config | None = None,
        previous_event: EventOverlap | None = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple[Tensor, Tensor | None, EventOverlap]:
        """Sum the rows of each token at the rank it came from, in fp32 and rank order. Collective.

        Args:
            x: [N, H] bf16, fp16 or fp32, in the order of ``recv_x``; weights are not applied.
            handle: from the dispatch that sent the tokens.
            topk_weights: [N, K] float32, summed like the rows and returned.
            bias: one or two [T, H] tensors of the rows' dtype, added to the result.
            config: accepted for compatibility.
            previous_event, async_finish, allocate_on_comm_stream: see :meth:`dispatch`.

        Returns:
            combined_x [T, H]; combined_topk_weights [T, K] or None; the event.

        Raises:
            InputError, HandleError, RankMismatchError, PeerError: as for :meth:`dispatch`.
        """
        backend = self._open()
        try:
            check_tensor("x", x)
            biases = bias_tensors(bias)
            self._runner.check(previous_event, async_finish, allocate_on_comm_stream)
            plan = self._plan_of(handle)
        except Exception as error:
            backend.refuse("combine", error)
        tokens, event = self._runner.run(
            lambda: backend.combine(plan, x, layout=Layout.BY_SOURCE, weights=topk_weights, bias=biases),
            previous_event=previous_event,
            async_finish=async_finish,
            allocate_on_comm_stream=allocate_on_comm_stream,
            reads=(x, topk_weights, *biases, *handle),
            made=lambda result: result,
        )
        return tokens.x, tokens.weights, event

    def internode_dispatch(
        self,
        x: Tensor | tuple[Tensor, Tensor],
        handle: Handle | None = None,
        num_tokens_per_rank: Tensor | None = None,
        num_tokens_per_rdma_rank: Tensor | None = None,
        is_token_in_rank: Tensor | None = None,
        num_tokens_per_expert: Tensor | None = None,
        topk_idx: Tensor | None = None,
        topk_weights: Tensor | None = None,
        expert_alignment: int = 1,
        config: Config | None = None,
        previous_event: EventOverlap | None = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
        num_worst_tokens: int = 0,
    ) -> tuple[
        Tensor | tuple[Tensor, Tensor], Tensor | None, Tensor | None, list[int] | None, Handle | None, EventOverlap
    ]:
        """:meth:`dispatch`, which works over several nodes too, with DeepEP's order of arguments."""
        return self.dispatch(
            x,
            handle,
            num_tokens_per_rank,
            num_tokens_per_rdma_rank,
            is_token_in_rank,
            num_tokens_per_expert,
            topk_idx,
            topk_weights,
            expert_alignment,
            num_worst_tokens,
            config,
            previous_event,
            async_finish,
            allocate_on_comm_stream,
        )

    def internode_combine(
        self,
        x: Tensor,
        handle: Handle,
        topk_weights: Tensor | None = None,
        bias: Tensor | tuple[Tensor, Tensor] | None = None,
        config: Config | None = None,
        previous_event: EventOverlap | None = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple[Tensor, Tensor | None, EventOverlap]:
        """:meth:`combine`, which works over several nodes too."""
        return self.combine(
            x, handle, topk_weights, bias, config, previous_event, async_finish, allocate_on_comm_stream
        )

    def _open(self) -> Backend:
        if self._backend is None:
            raise HandleError("this Buffer was destroyed; make a new one")
        return self._backend

    def _plan_of(self, handle: Any) -> Plan:
        if not isinstance(handle, Handle):
            raise HandleError(f"handle is {describe(handle)}; pass on the object that dispatch returned")
        if handle.owner is not self._identity:
            raise HandleError("the handle was made by another Buffer")
        return handle.plan


def tokens_and_scales(x: Any) -> tuple[Tensor, Tensor | None]:
    """The argument ``x`` of a dispatch, a tensor or a tuple of rows and scales, as rows and scales."""
    if not isinstance(x, tuple):
        check_tensor("x", x)
        return x, None
    if len(x) != 2:
        raise InputError("x", f"{len(x)} values", "must be a tensor or (rows, scales)")
    check_tensor("x[0]", x[0])
    check_tensor("x[1]", x[1])
    return x


def _check_counts(
    backend: Backend,
    topk_idx: Tensor,
    is_token_in_rank: Tensor,
    num_tokens_per_expert: Tensor,
    num_tokens_per_rank: Tensor | None,
) -> None:
    """Raise :class:`InputError` unless the results of ``get_dispatch_layout`` belong to ``topk_idx``."""
    expected = backend.destinations(topk_idx, num_tokens_per_expert.shape[0])
    for name, given, wanted in (
        ("is_token_in_rank", is_token_in_rank, expected.is_token_in_rank),
        ("num_tokens_per_expert", num_tokens_per_expert, expected.num_tokens_per_expert),
        ("num_tokens_per_rank", num_tokens_per_rank, expected.num_tokens_per_rank),
    ):
        if given is None:
            continue
        check_shape(name, given, tuple(wanted.shape), backend.device, wanted.dtype)
        if not torch.equal(given, wanted):
            first = (given != wanted).nonzero()[0].tolist()
            raise InputError(
                f"{name}{first}",
                given[tuple(first)].item(),
                f"is {wanted[tuple(first)].item()} by topk_idx; pass what get_dispatch_layout returned for it",
            )


def bias_tensors(bias: Any) -> tuple[Tensor, ...]:
    """The argument ``bias`` of a combine, which is None, a tensor, or a tuple or list of them, as a tuple."""
    if bias is None or isinstance(bias, Tensor):
        return () if bias is None else (bias,)
    if not isinstance(bias, (tuple, list)):
        raise InputError("bias", describe(bias), "must be a tensor, or two in a tuple")
    for part in bias:
        check_tensor("bias", part)
    return tuple(bias)


def _default_config(num_ranks: int) -> Config:
    check_integer("num_ranks", num_ranks, least=1)
    return Config(num_sms=Buffer.num_sms)
