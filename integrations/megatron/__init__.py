"""Megatron-Core plugin: ``moe_token_dispatcher_type="deepep"`` without a fork.

Importing this package teaches Megatron-Core (0.16.1 to 0.19.2) the new dispatcher type::

    import deepep_moe.integrations.megatron
    config = TransformerConfig(..., moe_token_dispatcher_type="deepep")

and so does the launcher, for training scripts that are not yours to edit::

    torchrun --nproc-per-node 8 -m deepep_moe.integrations.megatron pretrain_gpt.py \
        --moe-token-dispatcher-type deepep ...

``registration.py`` says what is changed in Megatron-Core, ``options.py`` which of its options mean what here,
``dispatcher.py`` is the dispatcher. ``experts.py`` has grouped-GEMM experts, ``copying.py`` lets models be copied, and
``cpu.py`` runs all of it without a GPU.
"""

from __future__ import annotations

import sys

from deepep_moe.integrations.megatron.registration import register

__all__ = ["register"]

# As a launcher (python -m), the script's directory may be where megatron.core lives: __main__ registers once it is
# importable. While Python looks for the module to run, sys.argv[0] is "-m".
if not (sys.argv and sys.argv[0] == "-m" and __name__ in sys.orig_argv):
    register()
