"""``python -m deepep_moe NAME ...``: run one of the tools listed in :mod:`deepep_moe.tools`."""

from __future__ import annotations

import importlib
import sys

from deepep_moe import __version__
from deepep_moe.tools import COMMANDS

USAGE_ERROR = 2  # exit status, as that of argparse


def main() -> int:
    """Run the tool that the first argument names. Returns its exit status."""
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in COMMANDS:
        status: int = importlib.import_module(COMMANDS[name][0]).main(sys.argv[2:])
        return status
    if name == "--version":
        print(f"deepep_moe {__version__}")
    elif name in ("--help", "-h"):
        print("usage: python -m deepep_moe NAME ...      (NAME --help says more)\n")
        for command, (_, line) in COMMANDS.items():
            print(f"  {command:<10} {line}")
        print("  --version  the version of deepep_moe\n")
        print("Also under torchrun: torchrun --nproc-per-node 2 -m deepep_moe doctor")
    else:
        hint = "; benchmarks are run from a checkout: python -m benchmarks --help" if name in ("bench", "model") else ""
        print(f"deepep_moe: there is no tool {name!r}; there is {', '.join(COMMANDS)}{hint}", file=sys.stderr)
        return USAGE_ERROR
    return 0


if __name__ == "__main__":
    sys.exit(main())
