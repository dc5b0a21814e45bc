"""The tests of plans' execution run on a GPU where there is one. None of them needs a TensorRT that runs."""

from tests.device_fixture import device

__all__ = ["device"]
