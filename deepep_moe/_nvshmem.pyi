"""Types of the module for transfers between nodes (csrc/nvshmem). Addresses and streams are as in ``_C.pyi``."""

import enum

ARCHITECTURES: str  # as in TORCH_CUDA_ARCH_LIST, separated by ";"

def new_unique_id() -> bytes: ...
def is_started() -> bool: ...
def start(rank: int, num_ranks: int, id: bytes, device: int) -> None: ...
def finish() -> None: ...
def this_pe() -> int: ...
def num_pes() -> int: ...
def allocate(num_bytes: int) -> int: ...
def mapped_address(address: int, pe: int) -> int: ...  # 0: not mapped
def remote_transport() -> str: ...
def built_version() -> list[int]: ...
def loaded_version() -> list[int]: ...
def probe(
    *,
    record: int,
    failed: int,
    timeout_seconds: float,
    rank: int,
    to: int,
    from_: int,
    to_pe: int,
    from_pe: int,
    sent: int,
    received: int,
    arrived: int,
    taken: int,
    first_round: int,
    rounds: int,
    chunks: int,
    chunk_bytes: int,
    check: bool,
    wrong: int,
    stream: int,
) -> None: ...

# -- the rail ---------------------------------------------------------------------------------------------------------

MAX_CHUNKS: int  # of an operation
RAIL_REGIONS: int
RAIL_STATE_BYTES: int  # device memory of a rank, zeroed
RAIL_FAILURE_WORDS: int  # pinned memory of int64: failed, phase, peer, expected, seen

class RailPhase(enum.IntEnum):
    START = ...
    ROWS = ...
    GIVEN_UP = ...

def rail_signal_bytes(num_ranks: int) -> int: ...

class RailArgs:
    def __init__(
        self,
        *,
        record: int,
        state: int,
        signals: int,
        pes: int,
        rank: int,
        num_ranks: int,
        region: int,
        timeout_seconds: float,
    ) -> None: ...

class RailChunk:
    def __init__(
        self, *, chunk: int, last: bool, block_rows: int, row_bytes: int, used: int, sent: int, received: int
    ) -> None: ...

def rail_begin(args: RailArgs, stream: int) -> None: ...
def rail_put(args: RailArgs, chunk: RailChunk, stream: int) -> None: ...
def rail_wait(args: RailArgs, chunk: RailChunk, stream: int) -> None: ...
def rail_give_up(args: RailArgs, stream: int) -> None: ...

# -- the latency engine over several nodes ----------------------------------------------------------------------------

LATENCY_SIGNAL_BYTES: int  # symmetric memory, zeroed
LATENCY_POSTED_BYTES: int  # device memory of a rank, zeroed

class LatencyStep(enum.IntEnum):
    DISPATCH = ...
    TABLES = ...
    ROWS = ...

class LatencyRemote:
    """The ranks of other nodes, ``ranks``. ``runtime``: of ``_C.LatencyEngine``."""

    def __init__(self, *, runtime: bytes, pes: list[int], ranks: list[int], signals: int, posted: int) -> None: ...
    def exchange(
        self,
        *,
        arena: bytes,
        step: LatencyStep,
        puts: bool,
        waits: bool,
        refuses: bool,
        num_tokens: int,
        topk_idx: int,
        wide_idx: bool,
        num_topk: int,
        num_experts: int,
        format: int,
        places: int,
        epoch: int,
        wait_stats: int,
        stream: int,
    ) -> None: ...
    def post(self, stream: int) -> None: ...
    def announce(self, withdrawn: bool, stream: int) -> None:
        """Put what ``_C.LatencyEngine.announce`` stored for ranks of other nodes."""

    def announce_refusal(self, others: int, stream: int) -> None:
        """As ``_C.LatencyEngine.announce_refusal``, for ranks of all nodes."""

    def refuse(self, kind: int, source: int, epoch: int, stream: int) -> None:
        """Tell ranks of other nodes that this one refuses a call; stores its number, or 0 if skipped, at ``epoch``."""

    def meet(self, second: bool, lift: list[int], stream: int) -> None: ...

class wide:
    """What begins with Latency, compiled for more ranks (csrc/runtime/ranks.h). A submodule."""

    LATENCY_SIGNAL_BYTES: int
    LATENCY_POSTED_BYTES: int
