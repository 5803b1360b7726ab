"""Run ranks for tests: :func:`torchrun` starts a command on several ranks, :func:`check_case` one function of many.

Starting ranks takes seconds, a case milliseconds, so a *case module* is started once per number of ranks and runs
all its cases::

    # tests/distributed/cases_sums.py
    @case()                       # or @case(ranks=(2, 4))
    def adds_up(group): ...       # called on every rank with a fresh gloo group; fails by raising

    # tests/distributed/test_sums.py
    @pytest.mark.parametrize(("ranks", "name"), all_cases("tests.distributed.cases_sums", ranks=(1, 2)))
    def test_sums(ranks, name):
        check_case("tests.distributed.cases_sums", ranks, name)

Ports are chosen by torchrun's own rendezvous, so tests may run side by side; ranks are stopped on every way out.
"""

from __future__ import annotations

import functools
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parent.parent
GROUP_TIMEOUT = timedelta(seconds=60)
_CASES = "_deepep_moe_cases"


def torchrun(
    ranks: int, *command: str, timeout: float = 120, env: Mapping[str, str] | None = None, check: bool = True
) -> subprocess.CompletedProcess[str]:
    """``torchrun --nproc-per-node ranks command...`` in the repository root; stdout holds stderr too.

    ``command`` is a script with arguments, or ``-m module ...``. With ``check`` a failure is an AssertionError
    that shows the output's end.
    """
    full = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", *command]
    process = subprocess.Popen(
        full,
        cwd=ROOT,
        env={**environment(), **(env or {})},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        _stop(process)
        output, _ = process.communicate()
        raise AssertionError(f"{ranks} ranks were not done within {timeout:g} s:\n{output[-6000:]}") from None
    finally:
        _stop(process)
    if check and process.returncode:
        raise AssertionError(f"{ranks} ranks failed with exit status {process.returncode}:\n{output[-6000:]}")
    return subprocess.CompletedProcess(full, process.returncode, output, "")


def environment() -> dict[str, str]:
    """Of processes that tests start."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}


def _stop(process: subprocess.Popen[str]) -> None:
    """End torchrun and every rank it started. Ranks lead sessions of their own: torchrun stops them on SIGTERM."""
    if process.poll() is None:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(20)
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return


def case(ranks: Iterable[int] | None = None) -> Callable[[Callable], Callable]:
    """Mark a function ``f(group)`` as a case, for any number of ranks or for those given."""

    def mark(function: Callable) -> Callable:
        cases = sys.modules[function.__module__].__dict__.setdefault(_CASES, {})
        cases[function.__name__] = (function, None if ranks is None else tuple(ranks))
        return function

    return mark


def on_ranks(module: str) -> Callable[[], ModuleType]:
    """What gives ``module``, imported by the ranks that run cases and not by the pytest process that lists them."""
    return functools.partial(importlib.import_module, module)


def include(module: str, *others: str, without: Iterable[str] = ()) -> None:
    """Make ``module`` hold the cases of ``others`` as well, so that one start of the ranks runs them all."""
    cases = sys.modules[module].__dict__.setdefault(_CASES, {})
    for other in others:
        short = other.rpartition(".")[2].removeprefix("cases_")
        for name, entry in vars(importlib.import_module(other)).get(_CASES, {}).items():
            if f"{short}.{name}" not in without:
                cases[f"{short}.{name}"] = entry


def cases_for(module: str, ranks: int) -> dict[str, Callable]:
    """Cases of ``module`` that run on this many ranks, by name."""
    marked = vars(importlib.import_module(module)).get(_CASES, {})
    return {name: function for name, (function, allowed) in marked.items() if allowed is None or ranks in allowed}


def all_cases(module: str, ranks: Iterable[int]) -> list[tuple[int, str]]:
    """(ranks, case name) pairs for ``pytest.mark.parametrize``."""
    return [(n, name) for n in ranks for name in cases_for(module, n)]


def check_case(module: str, ranks: int, name: str) -> None:
    """Fail with the tracebacks of the ranks on which the case failed."""
    errors = _run_all(module, ranks)
    assert name in errors, f"{name} was not reached:\n{errors.get('', '')}"
    assert errors[name] is None, errors[name]


@functools.cache
def _run_all(module: str, ranks: int) -> dict[str, str | None]:
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder) / "results.jsonl"
        try:
            torchrun(ranks, "-m", "tests.launch", module, str(results), timeout=240)
            errors: dict[str, str | None] = {}
        except AssertionError as error:
            errors = {"": str(error)}
        if results.exists():
            errors.update(json.loads(line) for line in results.read_text().splitlines())
        return errors


def _main(module: str, results: str) -> None:
    """One rank: run all cases, each on its own group; rank 0 writes a line per case."""
    import torch.distributed as dist

    dist.init_process_group("gloo", timeout=timedelta(seconds=120))
    world = dist.get_world_size()
    for name, function in cases_for(module, world).items():
        error: str | None = None
        started = time.monotonic()
        try:
            function(dist.new_group(timeout=GROUP_TIMEOUT))
        except Exception:
            error = f"rank {dist.get_rank()} of {world}:\n{traceback.format_exc()}"
        errors: list[str | None] = [None] * world
        dist.all_gather_object(errors, error)
        if dist.get_rank() == 0:
            print(f"{time.monotonic() - started:6.2f} s  {name}", flush=True)
            told = "\n".join(e for e in errors if e is not None) or None
            with open(results, "a", encoding="utf-8") as file:
                file.write(json.dumps([name, told]) + "\n")
    dist.destroy_process_group()


if __name__ == "__main__":
    _main(*sys.argv[1:])
