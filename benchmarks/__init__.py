"""Benchmarks of deepep_moe, run from a checkout: ``python -m benchmarks --help``. They are no part of the package."""
