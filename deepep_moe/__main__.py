"""``python -m deepep_moe NAME ...``: run one of the tools listed in :mod:`deepep_moe.tools`."""

from __future__ import annotations

import importlib
import sys

from rich.console import Console

from deepep_moe.tools import COMMANDS


def main() -> None:
    """Hand over to the tool that the first argument names."""
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in COMMANDS:
        app = importlib.import_module(COMMANDS[name][0]).app
        app(prog_name=f"deepep-moe {name}", args=sys.argv[2:])
    elif name in ("--help", "-h"):
        console = Console(highlight=False, soft_wrap=True)
        console.print("Usage: python -m deepep_moe NAME ...      (NAME --help says more)\n")
        for command, (_, line) in COMMANDS.items():
            console.print(f"  [bold]{command:<8}[/bold] {line}")
        console.print("\nAlso under torchrun: torchrun --nproc-per-node 2 -m deepep_moe doctor")
    else:
        hint = "; benchmarks are run from a checkout: python -m benchmarks --help" if name in ("bench", "model") else ""
        sys.exit(f"deepep_moe: there is no tool {name!r}; there is {', '.join(COMMANDS)}{hint}")


if __name__ == "__main__":
    main()
