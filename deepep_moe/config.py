"""Settings: :class:`DispatcherConfig` is what a user sets, :class:`Config` is DeepEP 1.x kernel tuning.

``DispatcherConfig`` is the one source of truth. Megatron arguments, the ds_config block, a YAML file and
``DEEPEP_MOE_*`` environment variables all end in :meth:`DispatcherConfig.load`; a later source wins:

    defaults  <  framework arguments  <  YAML file ($DEEPEP_MOE_CONFIG)  <  DEEPEP_MOE_<FIELD> variables

A new setting is one field here plus one line in ``_RULES``: every source, the documentation of errors and the
tools pick it up from the field.
"""

from __future__ import annotations

import difflib
import operator
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args, get_type_hints

from deepep_moe.errors import ConfigError

ENV_PREFIX = "DEEPEP_MOE_"
ENV_CONFIG_FILE = ENV_PREFIX + "CONFIG"
# Variables with our prefix that are no settings: the file above, and what setup.py and environment.sh read.
_OTHER_VARIABLES = (ENV_CONFIG_FILE, *(ENV_PREFIX + name for name in ("CUDA", "PYTHON", "NVSHMEM", "DELAY_PUTS")))

BackendName = Literal["auto", "collective", "hierarchical", "nvlink"]
RailName = Literal["nccl", "nvshmem"]


@dataclass(frozen=True)
class DispatcherConfig:
    """What a user can set. Frozen and hashable; impossible values raise :class:`~deepep_moe.errors.ConfigError`."""

    backend: BackendName = "auto"
    """Who moves the rows. ``auto``: ``nvlink`` within one node, ``hierarchical`` over several, each where it can run,
    else ``collective``."""
    expert_alignment: int = 1
    """Rows of each expert are padded with zero rows to a multiple of this."""
    num_sms: int = 0
    """SMs the communication kernels may use; 0 leaves it to the backend."""
    max_tokens_per_rank: int = 0
    """Staging memory is sized for this many tokens of one rank; 0 grows on demand."""
    fp8_dispatch: bool = False
    """Send BF16 tokens as e4m3 with one fp32 scale per 128 channels in the forward dispatch.
    They arrive as BF16, rounded."""
    fp8_dispatch_grad: bool = False
    """The same for gradients that travel by dispatch, which is the backward of combine."""
    capacity_factor: float = 0.0
    """Above 0: outputs have a fixed size, this factor over the balanced load, and nothing waits for the host.
    The load is that of ``max_tokens_per_rank`` tokens on each rank, or of this rank's own tokens where that is 0."""
    replay_on_overflow: bool = False
    """With ``capacity_factor``, in the plugins and recipes: a forward that overflows runs again with more room
    (:func:`deepep_moe.overflow.replay_on_overflow`, which other programs call themselves)."""
    num_chunks: int = 1
    """Cut a layer's tokens in this many chunks, so that one chunk communicates while another computes."""
    rail_chunk_bytes: int = 0
    """Rows between nodes cross in chunks of about this many bytes of a rank, so that one chunk moves inside the nodes
    while the next crosses; 0: 32 MiB on GPUs, all at once on CPUs."""
    rail: RailName = "nccl"
    """Who moves rows between nodes. ``nccl``: torch.distributed, which runs on every network. ``nvshmem``: puts from
    kernels, where deepep_moe was built with NVSHMEM; no host waits for counts, so a layer can be captured in a CUDA
    graph, and low-latency calls over several nodes run on kernels."""
    nvshmem_bytes: int = 1 << 30
    """Symmetric memory per GPU that ``rail=nvshmem`` takes, for all groups of a process together."""
    ranks_per_node: int = 0
    """For tests: cut the group into nodes of this many ranks; 0: a host is a node."""
    timeout_seconds: float = 100.0
    """Longest wait for a peer, in seconds. Where rows go through NCCL it limits the waits of the host and, with
    ``check_agreement``, finds a peer that is missing from a call; NCCL kernels themselves end with the timeout of the
    process group."""
    check_agreement: bool = True
    """Compare in every call what all ranks must share. Off: only once per plan, where it costs nothing extra.
    On CPUs every call is compared in any case."""
    debug_waits: bool = False
    """Print how long each rank waited for its peers."""

    def shared(self) -> dict[str, int | float | bool]:
        """The settings that must be the same on all ranks of a group, because they change what ranks exchange."""
        return {name: getattr(self, name) for name in _SHARED}

    def __post_init__(self) -> None:
        for field in fields(self):
            object.__setattr__(self, field.name, _parse(field.name, getattr(self, field.name), "argument"))

    @classmethod
    def load(
        cls,
        overrides: Mapping[str, Any] | None = None,
        *,
        source: str = "overrides",
        yaml_path: str | os.PathLike[str] | None = None,
        env: Mapping[str, str] = os.environ,
    ) -> DispatcherConfig:
        """Merge all sources: defaults < ``overrides`` < YAML file < environment.

        Args:
            overrides: framework arguments, by field name.
            source: where ``overrides`` were set, for error messages: "ds_config block deepep_moe", for example.
            yaml_path: a YAML mapping of field names; ``$DEEPEP_MOE_CONFIG`` names one when this is None.
            env: where ``DEEPEP_MOE_<FIELD>`` variables are read from. A variable with empty text counts as not set.

        Raises:
            ConfigError: unknown key (also an unknown ``DEEPEP_MOE_*`` variable), impossible value, unreadable file.
        """
        given: list[tuple[str, Any, str]] = [(key, value, source) for key, value in (overrides or {}).items()]
        path = yaml_path if yaml_path is not None else env.get(ENV_CONFIG_FILE)
        if path:
            given += [(key, value, os.fspath(path)) for key, value in _read_yaml(path).items()]
        for variable, text in env.items():
            if variable.startswith(ENV_PREFIX) and variable not in _OTHER_VARIABLES:
                key, where = variable[len(ENV_PREFIX) :].lower(), f"environment variable {variable}"
                _check_known(key, where)
                given += [(key, text, where)] if text.strip() else []

        merged: dict[str, Any] = {}
        for key, value, where in given:  # later wins
            _check_known(key, where)
            merged[key] = _parse(key, value, where)
        return cls(**merged)


_SHARED = (
    "max_tokens_per_rank",
    "fp8_dispatch",
    "fp8_dispatch_grad",
    "capacity_factor",
    "replay_on_overflow",
    "num_chunks",
    "rail_chunk_bytes",
    "ranks_per_node",
    "check_agreement",
)
_MOST = 2**31 - 1  # kernels count in int32
_MOST_SECONDS = 1e6  # transports count milliseconds in int32
_TYPES: dict[str, Any] = get_type_hints(DispatcherConfig)
_RULES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "backend": (lambda v: v in get_args(BackendName), "one of " + ", ".join(get_args(BackendName))),
    "expert_alignment": (lambda v: 1 <= v <= 2**16, "an integer from 1 to 65536"),
    "num_sms": (lambda v: 0 <= v <= _MOST, "an integer >= 0 (0: the backend's choice)"),
    "max_tokens_per_rank": (lambda v: 0 <= v <= _MOST, f"an integer from 0 (grow on demand) to {_MOST}"),
    "fp8_dispatch": (lambda v: True, "true or false"),
    "fp8_dispatch_grad": (lambda v: True, "true or false"),
    "capacity_factor": (lambda v: 0 <= v <= 1e6, "a number from 0 (exact sizes) to 1000000"),
    "replay_on_overflow": (lambda v: True, "true or false"),
    "num_chunks": (lambda v: 1 <= v <= 2**16, "an integer from 1 to 65536"),
    "rail_chunk_bytes": (lambda v: 0 <= v <= _MOST, f"an integer from 0 (automatic) to {_MOST}"),
    "rail": (lambda v: v in get_args(RailName), "one of " + ", ".join(get_args(RailName))),
    "nvshmem_bytes": (lambda v: 1 << 20 <= v <= 1 << 40, "an integer from 1048576 (1 MiB) to 1099511627776 (1 TiB)"),
    "ranks_per_node": (lambda v: 0 <= v <= _MOST, f"an integer from 0 (hosts are nodes) to {_MOST}"),
    "timeout_seconds": (lambda v: 1e-3 <= v <= _MOST_SECONDS, f"a number from 0.001 to {_MOST_SECONDS:g}"),
    "check_agreement": (lambda v: True, "true or false"),
    "debug_waits": (lambda v: True, "true or false"),
}
_BOOLEANS = {"1": True, "true": True, "yes": True, "on": True, "0": False, "false": False, "no": False, "off": False}


def _check_known(key: str, source: str) -> None:
    if key in _RULES:
        return
    close = difflib.get_close_matches(str(key), _RULES, n=1)
    hint = f" (did you mean {close[0]}?)" if close else ""
    raise ConfigError(f"unknown setting {key!r} from {source}{hint}; allowed: {', '.join(_RULES)}")


def _parse(key: str, value: Any, source: str) -> Any:
    """``value`` in the field's type; text (from the environment) is converted, nothing else is guessed."""
    accepts, allowed = _RULES[key]
    try:
        parsed = _convert(_TYPES[key], value)
    except (TypeError, ValueError, OverflowError):
        parsed = None
    if parsed is None or not accepts(parsed):
        try:
            shown = repr(value)
        except ValueError:  # Python does not print integers of thousands of digits
            shown = "a number of thousands of digits"
        raise ConfigError(f"{key} = {shown} from {source}: allowed is {allowed}")
    return parsed


def _convert(kind: Any, value: Any) -> Any:
    if kind is bool:
        return value if isinstance(value, bool) else _BOOLEANS[value.strip().lower()] if _is_bool_text(value) else None
    if isinstance(value, bool):
        return None  # True is an int to Python, but no count or factor
    if kind is int:
        return int(value) if isinstance(value, (int, str)) else None
    if kind is float:
        return float(value) if isinstance(value, (int, float, str)) else None
    return value if isinstance(value, str) else None


def _is_bool_text(value: Any) -> bool:
    return isinstance(value, str) and value.strip().lower() in _BOOLEANS


def _read_yaml(path: str | os.PathLike[str]) -> dict[str, Any]:
    import yaml  # only users of a settings file need it

    try:
        with open(path, encoding="utf-8") as file:
            content = yaml.safe_load(file)
    except (OSError, ValueError, yaml.YAMLError) as error:  # ValueError: no text, no such date, no path
        raise ConfigError(f"cannot read settings file {os.fspath(path)!r}: {error}") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(f"settings file {os.fspath(path)} holds a {type(content).__name__}; allowed is a mapping")
    return content


_RANKS_PER_NODE = 8  # one NVLink domain of the machines DeepEP 1.x programs are written for
_MAX_TOPK = 128  # upper bound used for sizing only
_CHANNELS_PER_SCALE = 128
_ALIGNMENT_BYTES = 128


@dataclass(frozen=True)
class Config:
    """DeepEP 1.x kernel tuning: how many SMs, and how many tokens travel at a time over NVLink and RDMA.

    Our kernels place rows directly and need no chunk sizes; the values are kept, validated and used for the size
    hints, so that programs written for DeepEP 1.x allocate as they always did.
    """

    num_sms: int = 20
    num_max_nvl_chunked_send_tokens: int = 6
    num_max_nvl_chunked_recv_tokens: int = 256
    num_max_rdma_chunked_send_tokens: int = 6
    num_max_rdma_chunked_recv_tokens: int = 256

    def __post_init__(self) -> None:
        for field in fields(self):
            _check_size(f"Config.{field.name}", getattr(self, field.name))
        for link in ("nvl", "rdma"):
            send = getattr(self, f"num_max_{link}_chunked_send_tokens")
            recv = getattr(self, f"num_max_{link}_chunked_recv_tokens")
            if send > recv:
                raise ConfigError(
                    f"Config.num_max_{link}_chunked_send_tokens = {send}: allowed is at most "
                    f"num_max_{link}_chunked_recv_tokens = {recv}"
                )

    def get_nvl_buffer_size_hint(self, hidden_bytes: int, num_ranks: int) -> int:
        """Bytes to reserve for NVLink staging, for rows of ``hidden_bytes`` and a group of ``num_ranks``."""
        _check_size("hidden_bytes", hidden_bytes)
        _check_size("num_ranks", num_ranks)
        peers = min(num_ranks, _RANKS_PER_NODE)
        return self._staging_bytes(hidden_bytes, peers, self.num_max_nvl_chunked_recv_tokens)

    def get_rdma_buffer_size_hint(self, hidden_bytes: int, num_ranks: int) -> int:
        """Bytes to reserve for RDMA staging; 0 when the group fits in one node."""
        _check_size("hidden_bytes", hidden_bytes)
        _check_size("num_ranks", num_ranks)
        if num_ranks <= _RANKS_PER_NODE:
            return 0
        nodes = -(-num_ranks // _RANKS_PER_NODE)
        both_directions = 2
        return both_directions * self._staging_bytes(hidden_bytes, nodes, self.num_max_rdma_chunked_recv_tokens)

    def _staging_bytes(self, hidden_bytes: int, peers: int, tokens: int) -> int:
        channels = max(1, self.num_sms // 2)
        scales = -(-hidden_bytes // _CHANNELS_PER_SCALE) * 4
        row = hidden_bytes + scales + _MAX_TOPK * (8 + 4) + 16  # indices, weights, source token
        total = channels * peers * (tokens * row + 64)  # 64: counters of one queue
        return -(-total // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES


def _check_size(name: str, value: Any) -> None:
    try:
        fits = not isinstance(value, bool) and operator.index(value) >= 1
    except TypeError:
        fits = False
    if not fits:
        raise ConfigError(f"{name} = {value!r}: allowed is an integer >= 1")
