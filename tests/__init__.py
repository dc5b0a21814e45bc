"""Tests of llmengine. The folders are those of the package, and each has its own helpers."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
"""The repository."""
