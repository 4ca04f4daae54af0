"""Benchmarks: ``python -m benchmarks NAME --json`` from the root of the repository. See docs/performance.md.

NAME is ``handoff``, ``reload`` or ``startup``. Contenders run in processes of their own, interleaved round by round.
"""
