"""Run a DeepSpeed training script with the ds_config block ``deepep_moe`` known, without editing the script."""

from __future__ import annotations

import sys

from deepep_moe.launcher import help_or_nothing, run_script

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
    help_or_nothing(argv, USAGE)
    run_script(argv, USAGE)  # importing the package has loaded the plugin


if __name__ == "__main__":
    main(sys.argv[1:])
