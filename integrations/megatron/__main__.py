"""Run a Megatron training script with the ``deepep`` token dispatcher available.

The plugin must be loaded before Megatron parses its arguments; this launcher does that and then runs the script
as if Python had been called with it.
"""

from __future__ import annotations

import sys

from deepep_moe.launcher import help_or_nothing, run_script

USAGE = """\
usage: python -m deepep_moe.integrations.megatron [--grouped-experts] [-m] SCRIPT [ARGUMENTS...]

Loads the deepep_moe plugin into Megatron-Core, then runs SCRIPT (a file, or with -m a module) with ARGUMENTS.

  --grouped-experts   experts of deepep layers as one grouped GEMM, in place of Megatron-Core's SequentialMLP

examples:
  torchrun --nproc-per-node 8 -m deepep_moe.integrations.megatron pretrain_gpt.py \\
      --num-experts 64 --expert-model-parallel-size 8 --moe-token-dispatcher-type deepep ...
  python -m deepep_moe.integrations.megatron -m my_package.train --config train.yaml

settings: --moe-deepep-num-sms (or --moe-flex-dispatcher-num-sms), a YAML file named by DEEPEP_MOE_CONFIG, and
DEEPEP_MOE_<FIELD> environment variables; see docs/megatron.md.
"""


def main(argv: list[str]) -> None:
    """Run the script named by ``argv``, the command line without the interpreter and the launcher."""
    help_or_nothing(argv, USAGE)
    grouped_experts = argv[0] == "--grouped-experts"

    def load_plugin() -> None:
        from deepep_moe.integrations.megatron import register

        register(grouped_experts=grouped_experts)

    run_script(argv[1:] if grouped_experts else argv, USAGE, before=load_plugin)


if __name__ == "__main__":
    main(sys.argv[1:])
