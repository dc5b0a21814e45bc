"""Tests of the CUDA backend run on the GPU where there is one, else through Triton's interpreter."""

from tests.device_fixture import device

__all__ = ["device"]
