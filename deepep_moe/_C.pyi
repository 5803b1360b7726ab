"""Types of the CUDA runtime (csrc/bindings.cpp). Addresses are ``tensor.data_ptr()`` values, 0 for "none"."""

MAX_RANKS: int
MAX_TOPK: int
MAX_EXPERTS: int
ARCHITECTURES: str  # as in TORCH_CUDA_ARCH_LIST, separated by ";"

def routes(
    routing_map: int,
    probs: int,
    dtype: int,
    num_tokens: int,
    num_experts: int,
    num_topk: int,
    topk_idx: int,
    weights: int,
    backward: bool,
    stream: int,
    /,
) -> None:
    """Map [T, E] bool and probabilities [T, E] -> indices [T, K] int64, ascending, -1 where a row has fewer, and their
    weights [T, K] fp32; ``backward``: gradients of the weights -> of the probabilities. ``dtype`` is theirs."""

class Buffer:
    def __init__(self, rank: int, num_ranks: int, device: int, timeout_seconds: float, record_waits: bool) -> None: ...
    @staticmethod
    def control_bytes() -> int: ...
    @staticmethod
    def staging_bytes(num_ranks: int, max_tokens: int, num_topk: int, pitch: int, /) -> tuple[int, int]:
        """Bytes in all, and bytes before the rows."""

    def set_control(self, addresses: list[int], /) -> None: ...
    def set_staging(self, addresses: list[int], max_tokens: int, num_topk: int, num_bytes: int, /) -> None: ...
    def layout(
        self,
        topk_idx: int,
        num_tokens: int,
        num_topk: int,
        num_experts: int,
        ranks_per_node: int,
        num_tokens_per_rank: int,
        num_tokens_per_node: int,
        num_tokens_per_expert: int,
        is_token_in_rank: int,
        stream: int,
        /,
    ) -> None: ...
    def begin_plan(
        self,
        topk_idx: int,
        given_membership: int,
        given_expert_counts: int,
        num_tokens: int,
        num_topk: int,
        num_experts: int,
        alignment: int,
        refused: bool,
        wait: bool,
        max_recv: int,
        max_rows: int,
        stream: int,
        /,
    ) -> None: ...
    def wait_plan(self, expert_counts: int, /) -> tuple[int, int, int, bool] | None:
        """Received rows, expert rows, most tokens of any rank, whether something failed; None: the kernel never ran."""

    def place_plan(
        self,
        send_slot: int,
        counted: int,
        received: int,
        row_recv: int,
        max_recv: int,
        max_rows: int,
        num_blocks: int,
        stream: int,
        /,
    ) -> None: ...
    def set_route(
        self,
        num_tokens: int,
        num_topk: int,
        max_recv: int,
        max_rows: int,
        send_slot: int,
        counted: int,
        received: int,
        row_recv: int,
        grouped: bool,
        /,
    ) -> None: ...
    def dispatch(
        self,
        x: int,
        format: int,
        row_bytes: int,
        pitch: int,
        scales: int,
        scale_row_stride: int,
        scale_channel_stride: int,
        num_scales: int,
        weights: int,
        out: int,
        out_scales: int,
        out_scale_row_stride: int,
        out_scale_channel_stride: int,
        out_weights: int,
        num_blocks: int,
        num_send_blocks: int,
        stream: int,
        /,
    ) -> None: ...
    def combine(
        self,
        x: int,
        dtype: int,
        row_bytes: int,
        pitch: int,
        weights: int,
        apply_weights: bool,
        carry_weights: bool,
        bias0: int,
        bias1: int,
        out: int,
        out_weights: int,
        num_blocks: int,
        num_send_blocks: int,
        stream: int,
        /,
    ) -> None: ...
    def take_failure(self, lasting_only: bool, /) -> tuple[int, int, int, int, int, int] | None:
        """failure, phase, peer, field, expected, seen (csrc/kernels/args.h)."""

    def wait_seconds(self) -> list[float]: ...

def weigh(
    x: int,
    rows: int,
    weights: int,
    row_recv: int,
    out: int,
    sums: int,
    dtype: int,
    num_rows: int,
    row_bytes: int,
    stream: int,
    /,
) -> None:
    """out [M, H] = x [M, H] * weights [M]; sums [M] fp32 = x * rows over H. Both 0 where row_recv is negative."""
