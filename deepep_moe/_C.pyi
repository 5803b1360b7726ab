"""Types of the CUDA runtime (csrc/bindings.cpp and the bindings of each engine).

Addresses are ``tensor.data_ptr()`` values, 0 for "none"; a stream is its raw address.
"""

import enum

from torch import Tensor

ARCHITECTURES: str  # as in TORCH_CUDA_ARCH_LIST, separated by ";"
MAX_RANKS: int
MAX_TOPK: int
MAX_EXPERTS: int
LATENCY_BLOCKS_PER_SM: int
LATENCY_BROKEN: int
LATENCY_ALLOCATING: int
LATENCY_MAX_BLOCKS: int
AGREED_WORDS: int
HEADER_WORDS: int
MAX_SUMMED_ROWS: int
NO_EXPERT_ROWS: int  # as max_rows of a plan: expert rows are not asked for
OPERATION_BY_EXPERT: int  # flags beside an OperationKind
OPERATION_WITH_WEIGHTS: int

class Failure(enum.IntEnum):
    TIMEOUT = ...
    PEER_FAILED = ...
    MISMATCH = ...
    BAD_EXPERT = ...
    RECV_OVERFLOW = ...
    ROWS_OVERFLOW = ...
    STAGING = ...
    BAD_PEER_INPUT = ...
    REPEATED_EXPERT = ...
    CHANGED_ROUTE = ...

class Phase(enum.IntEnum):
    """Where a rank was when it failed: the members are in csrc/runtime/domain.h."""

    PLAN_COUNTS = ...

class Field(enum.IntEnum):
    """What ranks compare: the members are in csrc/runtime/domain.h."""

    NUM_EXPERTS = ...

class OperationKind(enum.IntEnum):
    DISPATCH = ...
    COMBINE = ...
    GROW = ...
    REFUSE = ...
    PLAN = ...

class DataType(enum.Enum):
    FLOAT32 = ...
    BFLOAT16 = ...
    FLOAT16 = ...

class Format(enum.Enum):
    AS_GIVEN = ...
    TO_FP8 = ...
    THROUGH_FP8 = ...

# -- kernels of one rank alone ----------------------------------------------------------------------------------------

def routes(
    routing_map: int,
    probs: int,
    dtype: DataType,
    num_tokens: int,
    num_experts: int,
    num_topk: int,
    topk_idx: int,
    weights: int,
    backward: bool,
    stream: int,
) -> None:
    """Map [T, E] bool and probabilities [T, E] -> indices [T, K] int64, ascending, -1 where a row has fewer, and their
    weights [T, K] fp32; ``backward``: gradients of the weights -> of the probabilities. ``dtype`` is theirs."""

def scale_rows(
    x: int,
    rows: int,
    weights: int,
    row_recv: int,
    out: int,
    sums: int,
    dtype: DataType,
    num_rows: int,
    row_bytes: int,
    stream: int,
) -> None:
    """out [M, H] = x [M, H] * weights [M]; sums [M] fp32 = x * rows over H. Both 0 where row_recv is negative."""

class Messages:
    """What the ranks send each other in a plan, [R, HEADER_WORDS + R + expert_words + row_words] int64."""

    def __init__(self, data: int, num_ranks: int, expert_words: int, row_words: int) -> None: ...

class Headers:
    """Headers of all ranks, [R, AGREED_WORDS] int64, to be compared; address 0: nothing is compared."""

    def __init__(self, data: int, num_ranks: int) -> None: ...

class Segments:
    def __init__(self, own_first: int, num_own: int) -> None: ...

class Places:
    """[n, width] int32, ``stride`` elements from item to item; address 0: row i belongs to item i."""

    def __init__(self, data: int, width: int, stride: int, starts: int) -> None: ...

class Scales:
    def __init__(self, data: int, row_stride: int, channel_stride: int) -> None: ...

class PackedRows:
    def __init__(self, data: int, pitch: int, row_bytes: int, num_scales: int, num_weights: int) -> None: ...

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
    """Count a batch: a message for each rank, and the number of each token among those for each rank [T, R] int32."""

def announce(*, header: list[int], num_ranks: int, out: int, stream: int) -> None:
    """[2 * R, AGREED_WORDS] int64: the header once for each rank, then rows that differ, for the ranks' headers."""

def starts(*, messages: Messages, rank: int, starts: int, stream: int) -> None:
    """[2, R] int32: first row for each rank, of those sent (own last) and those that come back (own first)."""

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
    """Fill ``counted``, ``received`` and ``row_recv`` of a plan."""

def pack(
    *,
    x: int,
    scales: Scales,
    weights: int,
    num_rows: int,
    quantise: bool,
    places: Places,
    out: PackedRows,
    stream: int,
) -> None: ...
def expand(
    *,
    rows: PackedRows,
    segments: Segments,
    num_received: int,
    dequantise: bool,
    places: Places,
    row_recv: int,
    owned: int,
    owned_stride: int,
    num_out: int,
    out: int,
    out_scales: Scales,
    out_weights: int,
    headers: Headers,
    stream: int,
) -> None: ...
def sum(
    *,
    x: int,
    pitch: int,
    row_bytes: int,
    dtype: DataType,
    places: Places,
    num_items: int,
    bias: list[int],
    out: int,
    out_pitch: int,
    segments: Segments,
    row_weights: int,
    apply_weights: bool,
    vectors: int,
    vectors_pitch: int,
    out_vectors: int,
    out_vectors_pitch: int,
    num_weights: int,
    headers: Headers,
    stream: int,
) -> None: ...

# -- the domain -------------------------------------------------------------------------------------------------------

class Domain:
    def __init__(self, rank: int, num_ranks: int, device: int, timeout_seconds: float, record_waits: bool) -> None: ...
    @staticmethod
    def mailbox_bytes() -> int: ...
    def set_mailboxes(self, addresses: list[int], /) -> None: ...
    @property
    def failure(self) -> tuple[int, int, int, int, int, int] | None:
        """failure, phase, peer, field, expected, seen (csrc/runtime/domain.h)."""

    @property
    def notice(self) -> tuple[int, int, int, int, int, int] | None: ...
    @property
    def broken(self) -> bool: ...
    def resume(self, stream: int, /) -> None: ...
    def take_notice(self, stream: int, /) -> None: ...
    def give_up(self, stream: int, /) -> None: ...
    def wait_seconds(self) -> list[float]: ...

# -- the throughput engine --------------------------------------------------------------------------------------------

class Route:
    def __init__(
        self,
        *,
        plan: int,
        num_tokens: int,
        num_topk: int,
        max_recv: int,
        max_rows: int,
        send_slot: int,
        counted: int,
        received: int,
        row_recv: int,
        grouped: bool,
    ) -> None: ...

class ThroughputEngine:
    def __init__(self, domain: Domain) -> None: ...
    @staticmethod
    def control_bytes() -> int: ...
    @staticmethod
    def staging_bytes(num_ranks: int, max_tokens: int, num_topk: int, pitch: int, /) -> int: ...
    def set_control(self, addresses: list[int], /) -> None: ...
    def set_staging(
        self, addresses: list[int], max_tokens: int, num_topk: int, num_bytes: int, stream: int, /
    ) -> None: ...
    def destinations(
        self,
        *,
        topk_idx: int,
        num_tokens: int,
        num_topk: int,
        num_experts: int,
        num_tokens_per_rank: int,
        num_tokens_per_expert: int,
        is_token_in_rank: int,
        stream: int,
    ) -> None: ...
    def begin_plan(
        self,
        *,
        topk_idx: int,
        given_membership: int,
        given_expert_counts: int,
        num_tokens: int,
        num_topk: int,
        num_experts: int,
        alignment: int,
        wait: bool,
        max_recv: int,
        max_rows: int,
        stream: int,
    ) -> None: ...
    def refuse_plan(self, stream: int, /) -> None: ...
    def wait_plan(self, expert_counts: int, /) -> tuple[int, int, int, bool] | None:
        """Received rows, expert rows, most tokens of any rank, whether something failed; None: the kernel never ran."""

    def place_plan(
        self,
        *,
        send_slot: int,
        counted: int,
        received: int,
        row_recv: int,
        max_recv: int,
        max_rows: int,
        num_blocks: int,
        stream: int,
    ) -> None: ...
    def dispatch(
        self,
        route: Route,
        *,
        format: Format,
        format_code: int,
        row_bytes: int,
        pitch: int,
        x: int,
        x_stride: int,
        scales: int,
        scale_row_stride: int,
        scale_channel_stride: int,
        num_scales: int,
        with_weights: bool,
        weights: int,
        weights_stride: int,
        out: int,
        out_scales: int,
        out_scale_row_stride: int,
        out_scale_channel_stride: int,
        out_weights: int,
        num_blocks: int,
        num_send_blocks: int,
        stream: int,
    ) -> None: ...
    def combine(
        self,
        route: Route,
        *,
        dtype: DataType,
        format_code: int,
        row_bytes: int,
        pitch: int,
        x: int,
        weights: int,
        apply_weights: bool,
        carry_weights: bool,
        bias0: int,
        bias1: int,
        out: int,
        out_stride: int,
        out_weights: int,
        out_weights_stride: int,
        num_blocks: int,
        num_send_blocks: int,
        stream: int,
    ) -> None: ...
    def refuse_operation(self, counted: int, stream: int, /) -> None: ...
    def meet_to_grow(self, max_tokens: int, num_topk: int, pitch: int, stream: int, /) -> None: ...
    def keep_scratch(self) -> None: ...
    def scratch_serves(self, num_tokens: int, num_topk: int, num_experts: int, /) -> bool: ...
    def set_epochs(self, plan_epoch: int, data_epoch: int, stream: int, /) -> None:
        """For tests: the next plan and operation get the numbers after these."""

def fill_peers(targets: list[int], num_bytes: int, num_blocks: int, stream: int) -> None:
    """Store ``num_bytes`` (a multiple of 16) to every address, all at once; for measuring the link."""

# -- plans of several nodes -------------------------------------------------------------------------------------------

class NodeMap:
    """Nodes and rails as one rank sees them, with addresses of int64 arrays; methods launch kernels (csrc/nodes)."""

    def __init__(
        self,
        *,
        node_of: int,
        place_of: int,
        rail_members: int,
        rail_nodes: int,
        rail_before: int,
        runs: int,
        num_ranks: int,
        num_nodes: int,
        node_size: int,
        rank: int,
        node: int,
        place: int,
        rail_rank: int,
    ) -> None: ...
    def summarize(
        self,
        *,
        topk_idx: int,
        num_tokens: int,
        num_topk: int,
        num_experts: int,
        max_recv: int,
        max_rows: int,
        header: list[int],
        messages: int,
        experts: int,
        room: int,
        send_slot: int,
        send_position: int,
        stream: int,
    ) -> None: ...
    def digest(
        self,
        *,
        messages: int,
        experts: int,
        room: int,
        alignment: int,
        most_tokens: int,
        found: int,
        counted: int,
        moved: int,
        rail_tokens: int,
        bad: int,
        stream: int,
    ) -> None: ...
    def batch(
        self,
        *,
        messages: int,
        experts: int,
        message_room: int,
        bad: int,
        room: int,
        num_topk: int,
        routes: int,
        recv_position: int,
        stream: int,
    ) -> None: ...
    def place(
        self,
        *,
        messages: int,
        experts: int,
        message_room: int,
        node_received: int,
        node_counted: int,
        moved: int,
        num_recv: int,
        num_rows: int,
        room: int,
        num_topk: int,
        received: int,
        row_recv: int,
        arrived: int,
        stream: int,
    ) -> None: ...
    def parts(
        self,
        *,
        num_tokens: int,
        num_recv: int,
        num_topk: int,
        room: int,
        chunks: int,
        exact: bool,
        most_of_share: int,
        by_expert: bool,
        sent: int,
        received: int,
        rail_tokens: int,
        send_position: int,
        recv_position: int,
        slots: int,
        node_counted: int,
        counted_size: int,
        experts: int,
        experts_stride: int,
        arrived: int,
        counted: int,
        batch_counts: int,
        arrived_counts: int,
        no_padding: int,
        chunk_slots: int,
        placed: int,
        own_slots: int,
        send_moves: int,
        recv_moves: int,
        recv_starts: int,
        send_used: int,
        recv_used: int,
        send_rows: int,
        home_rows: int,
        stream: int,
    ) -> None: ...

# -- the latency engine -----------------------------------------------------------------------------------------------

class LatencyArena:
    """Symmetric memory of one (M, hidden size): the address of each rank's, as mapped here."""

    def pack(self) -> bytes: ...
    @property
    def max_tokens(self) -> int: ...
    @property
    def hidden(self) -> int: ...

class LatencyKind(enum.IntEnum):
    DISPATCH = ...
    COMBINE = ...

class LatencyShape:
    """Kernel arguments that are the same in all calls of a shape."""

    def __init__(
        self,
        *,
        arena: LatencyArena,
        format: int,
        num_tokens: int,
        num_topk: int,
        num_experts: int,
        wide_idx: bool,
        ranges_at: int,
        src_info_at: int,
        counts_at: int,
    ) -> None: ...

class TensorSignatures:
    """Dtypes and sizes of several tensors on one device, as a value to compare and hash."""

    def __init__(self, device_type: int, device_index: int) -> None:
        """Arguments: what ``tensor.__dlpack_device__()`` returns."""

    def of(self, *tensors: Tensor | None) -> bytes | None:
        """For four or five tensors; None if one of them is not a plain, contiguous tensor on the device."""

class LatencyEngine:
    def __init__(self, domain: Domain, num_blocks: int, masks: bool) -> None: ...
    @staticmethod
    def fewest_blocks(num_ranks: int, /) -> int: ...
    @staticmethod
    def control_bytes() -> int: ...
    @staticmethod
    def arena_bytes(num_ranks: int, max_tokens: int, hidden: int, /) -> int: ...
    @staticmethod
    def places_words(num_ranks: int, max_tokens: int, num_topk: int, /) -> int: ...
    def set_control(self, addresses: list[int], /) -> None: ...
    def dispatch(
        self,
        shape: LatencyShape,
        half: int,
        x: Tensor,
        topk_idx: Tensor,
        memory: Tensor,
        rows: Tensor,
        scales: Tensor | None,
        stats: Tensor | None,
        wait_stats: Tensor | None,
        stream: int,
        /,
    ) -> int:
        """Launch. The result is what kernels had reported before: 0 nothing; LATENCY_BROKEN: a failure that lasts, and
        nothing was launched; else something that can be raised once this rank has taken part."""

    def combine(
        self,
        shape: LatencyShape,
        half: int,
        x: Tensor,
        topk_idx: Tensor,
        wide_idx: bool,
        weights: Tensor,
        memory: Tensor,
        epoch: Tensor | None,
        out: Tensor,
        wait_stats: Tensor | None,
        stream: int,
        /,
    ) -> int:
        """As :meth:`dispatch`."""

    def announce(
        self,
        *,
        max_tokens: int,
        hidden: int,
        num_topk: int,
        num_experts: int,
        format: int,
        withdrawn: bool,
        stream: int,
    ) -> None: ...
    def add_arena(self, addresses: list[int], max_tokens: int, hidden: int, /) -> LatencyArena: ...
    def announce_refusal(self, others: int, stream: int, /) -> None:
        """Announce that this rank refuses the next dispatch, and wait for what the others send or announce.

        ``others``: address of an int, which is set to LATENCY_ALLOCATING if others allocate an arena, to 0 if they are
        in the call, and is left alone while kernels are frozen.
        """

    def refuse(self, *, kind: LatencyKind, passed_on: int, source: int, stream: int) -> None:
        """Take part in a call without tokens. ``passed_on``: where a dispatch stores its epoch; ``source``: where the
        epoch of the combine's dispatch is."""

    def set_mask(self, rank: int, stream: int, /) -> None: ...
    def query_mask(self, status: int, stream: int, /) -> None: ...
    def lift_masks(self, lift: list[int], stream: int, /) -> None: ...
    def clear_rows(self, stream: int, /) -> None: ...
    def pack_runtime(self) -> bytes: ...

class wide:
    """MAX_RANKS, Domain and what begins with Latency, compiled for more ranks (csrc/runtime/ranks.h). A submodule."""

    MAX_RANKS: int
