"""Command-line tools: ``python -m deepep_moe NAME``, also installed as ``deepep-moe NAME``.

A tool is a module with ``app``, a ``typer.Typer``, and one line in :data:`COMMANDS`. It is imported only when asked
for, so ``--help`` is quick and one tool's needs are not another's.
"""

from __future__ import annotations

COMMANDS: dict[str, tuple[str, str]] = {
    "doctor": ("deepep_moe.tools.doctor", "what is installed here, which backend would run and why, and does it work"),
}
"""Name: (module, one line of help)."""
