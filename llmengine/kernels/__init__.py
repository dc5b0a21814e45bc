"""Triton kernels of the CUDA backend, each beside its torch reference. Nothing on a CPU-only path imports them."""
