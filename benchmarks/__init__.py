"""Benchmarks of llmengine; run them from the repository's root as `python -m benchmarks.NAME`."""
