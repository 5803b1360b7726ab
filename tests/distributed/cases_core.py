"""All cases of the core in one launch per number of ranks.

Cases that make a group on one rank alone come after those with nodes: torch names groups by their number, so ranks that
have made different numbers of groups cannot make those of nodes. Peers come last: they use the groups up.
"""

from __future__ import annotations

from tests.launch import include

include(
    __name__,
    "tests.distributed.cases_dispatcher",
    "tests.distributed.cases_autograd",
    "tests.distributed.cases_buffer",
    "tests.distributed.cases_elastic",
    "tests.distributed.cases_low_latency",
    "tests.distributed.cases_overlap",
    "tests.distributed.cases_overflow",
    "tests.distributed.cases_stats",
    "tests.distributed.cases_defaults",
    "tests.distributed.cases_nn",
    "tests.distributed.cases_collective_cuda",
    "tests.distributed.cases_dispatcher_arguments",
    "tests.distributed.cases_refusals",
    "tests.distributed.cases_peers",
)
