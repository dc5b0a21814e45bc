"""The native CPU decoder: one shared library for each kind of vector unit. A library that does not compile is omitted.

A wheel with at least one library is for this platform and Python version; a wheel built without a compiler has none and
is for all platforms.
"""

import os
import platform
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel

FLAGS = [
    "-std=c++17",
    "-O3",
    "-g0",
    "-pthread",
    "-fopenmp-simd",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fno-exceptions",
    "-fno-rtti",
    "-ffp-contract=off",  # see multiply_add
]
HEADERS = sorted(map(str, Path("llmengine/backends/cpu").glob("native_*.h")))
VARIANTS = {"generic": []}
if platform.machine().lower() in ("x86_64", "amd64"):
    VARIANTS["avx2"] = ["-mavx2", "-mfma", "-mf16c"]
    VARIANTS["avx512"] = ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mf16c"]
    VARIANTS["avx512vnni"] = [*VARIANTS["avx512"], "-mavx512vnni"]


class TaggedByContent(bdist_wheel):
    """A wheel tagged for one platform only if it contains native libraries."""

    def get_tag(self) -> tuple[str, str, str]:
        """The tags of a wheel that has been built; called before its metadata is written."""
        build_ext = self.get_finalized_command("build_ext")
        if any(Path(path).exists() for path in build_ext.get_outputs()):
            return super().get_tag()
        print("no native decoder was built: the wheel contains only Python files and is tagged for all platforms")
        self.root_is_pure = True
        return ("py3", "none", "any")


setup(
    cmdclass={"bdist_wheel": TaggedByContent},
    options={"build_ext": {"parallel": os.cpu_count()}},
    ext_modules=[
        Extension(
            f"llmengine.backends.cpu._native_{name}",
            ["llmengine/backends/cpu/native.cpp"],
            depends=HEADERS,
            extra_compile_args=[*FLAGS, *flags],
            extra_link_args=["-pthread"],
            optional=True,
        )
        for name, flags in VARIANTS.items()
    ],
)
