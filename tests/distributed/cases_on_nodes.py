"""The cases of the core once more, on the hierarchical backend: what serves one node serves several."""

from __future__ import annotations

import os

from deepep_moe import DispatcherConfig
from deepep_moe.backends.hierarchical_planner import Planner
from tests.launch import include

_RANKS_PER_NODE = {"2": 1, "4": 2}


def _by_default(**settings: object) -> None:
    """Make these the defaults of every DispatcherConfig of this process."""
    names = list(DispatcherConfig.__dataclass_fields__)
    defaults = list(DispatcherConfig.__init__.__defaults__ or ())
    for name, value in settings.items():
        defaults[names.index(name)] = value
    DispatcherConfig.__init__.__defaults__ = tuple(defaults)


def _plan_as_on_gpus() -> None:
    """Let ranks find differences in the messages of a plan, without headers ahead of them."""
    post_init = Planner.__post_init__

    def changed(self: Planner) -> None:
        post_init(self)
        self.agrees_first = False

    Planner.__post_init__ = changed  # type: ignore[method-assign]


if "RANK" in os.environ:  # not in the process that lists the cases
    _by_default(backend="hierarchical", ranks_per_node=_RANKS_PER_NODE[os.environ["WORLD_SIZE"]], rail_chunk_bytes=200)
    if os.environ["WORLD_SIZE"] == "4":
        _plan_as_on_gpus()

include(
    __name__,
    "tests.distributed.cases_dispatcher",
    "tests.distributed.cases_buffer",
    "tests.distributed.cases_elastic",
    "tests.distributed.cases_overlap",
    "tests.distributed.cases_autograd",
    "tests.distributed.cases_defaults",
    "tests.distributed.cases_refusals",
    "tests.distributed.cases_peers",
    # What is different with nodes; cases_nodes.py has cases of its own for it.
    without=("buffer.layout_counts_destinations", "buffer.combine_accumulates_in_fp32_and_rounds_once_per_hop"),
)
