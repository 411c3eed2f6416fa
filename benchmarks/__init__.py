"""Programs that measure; run from the root of the repository: `python -m benchmarks.NAME`."""
