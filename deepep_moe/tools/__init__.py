"""Command-line tools: ``python -m deepep_moe NAME``, also installed as ``deepep-moe NAME``.

A tool is a module with ``main(arguments) -> exit status``, and one line in :data:`COMMANDS`. It is imported only when
it is run, so ``--help`` does not import torch.
"""

from __future__ import annotations

COMMANDS: dict[str, tuple[str, str]] = {
    "doctor": ("deepep_moe.tools.doctor", "what is installed here, which backend would run and why, and does it work"),
    "nvshmem": ("deepep_moe.tools.nvshmem", "does NVSHMEM move rows between these GPUs, and how fast"),
}
"""Name: (module, one line of help)."""
