"""Runner tests run on the GPU where there is one; on neither machine do they need a TensorRT that runs."""

from tests.device_fixture import device

__all__ = ["device"]
