"""Run a DeepSpeed training script with the ds_config block ``deepep_moe`` known, without editing the script."""

from __future__ import annotations

import os
import runpy
import sys

USAGE = """\
usage: python -m deepep_moe.integrations.deepspeed [-m] SCRIPT [ARGUMENTS...]

Loads the deepep_moe plugin into DeepSpeed, then runs SCRIPT (a file, or with -m a module) with ARGUMENTS.

examples:
  deepspeed --module deepep_moe.integrations.deepspeed train.py --deepspeed_config ds_config.json
  torchrun --nproc-per-node 8 -m deepep_moe.integrations.deepspeed train.py --deepspeed_config ds_config.json
  python -m deepep_moe.integrations.deepspeed -m my_package.train

settings: the block "deepep_moe" of ds_config, a YAML file named by DEEPEP_MOE_CONFIG, and DEEPEP_MOE_<FIELD>
environment variables; see docs/deepspeed.md.
"""


def main(argv: list[str]) -> None:
    """Run the script named by ``argv``, the command line without the interpreter and the launcher."""
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE, end="", file=sys.stdout if argv else sys.stderr)
        sys.exit(0 if argv else 2)
    as_module = argv[0] == "-m"
    target = argv[1:] if as_module else argv
    if not target:
        sys.exit(f"no module to run\n\n{USAGE}")
    if not as_module and not os.path.isfile(target[0]):
        sys.exit(f"no such script: {target[0]}\n\n{USAGE}")

    # What `python SCRIPT` and `python -m MODULE` put first on the module path.
    sys.path.insert(0, os.getcwd() if as_module else os.path.dirname(os.path.abspath(target[0])))
    sys.argv = list(target)
    if as_module:
        runpy.run_module(target[0], run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(target[0], run_name="__main__")


if __name__ == "__main__":
    main(sys.argv[1:])  # importing the package has loaded the plugin
