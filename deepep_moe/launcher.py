"""Run somebody's training script with a plugin loaded: what the launchers of the integrations share."""

from __future__ import annotations

import os
import runpy
import sys
from collections.abc import Callable


def help_or_nothing(argv: list[str], usage: str) -> None:
    """Show ``usage`` and exit where ``argv`` asks for it (status 0) or names nothing to run (status 2)."""
    if not argv or argv[0] in ("-h", "--help"):
        print(usage, end="", file=sys.stdout if argv else sys.stderr)
        sys.exit(0 if argv else 2)


def run_script(target: list[str], usage: str, before: Callable[[], None] = lambda: None) -> None:
    """Run ``SCRIPT ARGUMENTS...`` or ``-m MODULE ARGUMENTS...`` as the main program.

    Args:
        target: the command line from there on.
        before: called once the module path is the script's own.
    """
    as_module = target[:1] == ["-m"]
    target = target[1:] if as_module else target
    if not target:
        sys.exit(f"no script or module to run\n\n{usage}")
    if not as_module and not os.path.isfile(target[0]):
        sys.exit(f"no such script: {target[0]}\n\n{usage}")

    # What `python SCRIPT` and `python -m MODULE` put first on the module path; Megatron-LM checkouts rely on it.
    sys.path.insert(0, os.getcwd() if as_module else os.path.dirname(os.path.abspath(target[0])))
    before()
    sys.argv = list(target)
    if as_module:
        runpy.run_module(target[0], run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(target[0], run_name="__main__")
