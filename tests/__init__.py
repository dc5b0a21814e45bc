"""Tests of llmengine, in folders like the package's, each with its helpers."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
"""The repository."""
