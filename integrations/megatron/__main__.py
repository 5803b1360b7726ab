"""Run a Megatron training script with the ``deepep`` token dispatcher available.

The plugin must be loaded before Megatron parses its arguments; this launcher does that and then runs the script
as if Python had been called with it.
"""

from __future__ import annotations

import os
import runpy
import sys

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
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE, end="", file=sys.stdout if argv else sys.stderr)
        sys.exit(0 if argv else 2)
    grouped_experts = argv[0] == "--grouped-experts"
    target = argv[1:] if grouped_experts else argv
    as_module = target[:1] == ["-m"]
    target = target[1:] if as_module else target
    if not target:
        sys.exit(f"no script or module to run\n\n{USAGE}")
    if not as_module and not os.path.isfile(target[0]):
        sys.exit(f"no such script: {target[0]}\n\n{USAGE}")

    # What `python SCRIPT` and `python -m MODULE` put first on the module path; Megatron-LM checkouts rely on it.
    sys.path.insert(0, os.getcwd() if as_module else os.path.dirname(os.path.abspath(target[0])))
    from deepep_moe.integrations.megatron import register

    register(grouped_experts=grouped_experts)
    sys.argv = list(target)
    if as_module:
        runpy.run_module(target[0], run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(target[0], run_name="__main__")


if __name__ == "__main__":
    main(sys.argv[1:])
