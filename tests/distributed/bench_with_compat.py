"""``python -m benchmarks`` where ``import deep_ep`` gives this library's own buffers: what it does where DeepEP is."""

from __future__ import annotations

import sys

import deepep_moe.compat

if __name__ == "__main__":
    deepep_moe.compat.install()
    from benchmarks.__main__ import main

    sys.exit(main())
