"""The native CPU decoder: one shared object for each kind of vector unit, each left out where it does not compile."""

import platform

from setuptools import Extension, setup

FLAGS = [
    "-std=c++17",
    "-O3",
    "-g0",
    "-fopenmp-simd",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fno-exceptions",
    "-fno-rtti",
]
VARIANTS = {"generic": []}
if platform.machine().lower() in ("x86_64", "amd64"):
    VARIANTS["avx2"] = ["-mavx2", "-mfma", "-mf16c"]
    VARIANTS["avx512"] = ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mf16c"]
    VARIANTS["avx512vnni"] = [*VARIANTS["avx512"], "-mavx512vnni"]

setup(
    ext_modules=[
        Extension(
            f"llmengine.backends.torch._native_{name}",
            ["llmengine/backends/torch/native.cpp"],
            extra_compile_args=[*FLAGS, *flags],
            optional=True,
        )
        for name, flags in VARIANTS.items()
    ]
)
