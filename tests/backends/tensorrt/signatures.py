"""Signatures of TensorRT's Python interface: read from a binding's docstrings, kept in `signatures.json`.

To write that file again after the package has begun to use another member, or for another version::

    pip download --no-deps tensorrt_cu13_bindings==11.4.* tensorrt_cu13_bindings==10.16.*    (one at a time)
    python -m tests.backends.tensorrt.signatures *.whl

It needs tensorrt_rtx, on which it finds out which members are used, and a C compiler: the bindings are imported
without the library that they bind, on empty stand-ins for the few C functions that they link to.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tests import ROOT

Arity = list[int]
"""Least and most arguments of one overload."""
Signatures = dict[str, list[Arity]]
"""Member -> its overloads; empty for what is no function."""

TABLE = Path(__file__).with_name("signatures.json")

_STUBS = {
    "nvinfer": (
        "createInferBuilder_INTERNAL",
        "createInferRefitter_INTERNAL",
        "createInferRuntime_INTERNAL",
        "getBuilderPluginRegistry",
        "getInferLibVersion",
        "getPluginRegistry",
    ),
    "nvinfer_plugin": ("initLibNvInferPlugins",),
    "nvonnxparser": (
        "createNvOnnxParserRefitter_INTERNAL",
        "createNvOnnxParser_INTERNAL",
        "getNvOnnxParserVersion",
    ),
}


def signature_of(module: Any, member: str) -> list[Arity] | None:
    """Return the overloads of a member, None if there is no such member."""
    found = module
    for part in member.split("."):
        found = getattr(found, part, None)
        if found is None:
            return None
    if not callable(found) or isinstance(found, type):
        return []
    lines = re.findall(rf"^(?:\d+\. )?{re.escape(part)}\((.*)\) -> ", found.__doc__ or "", re.MULTILINE)
    return [arity_of(line) for line in lines if line != "*args, **kwargs"]


def arity_of(parameters: str) -> Arity:
    """Return the least and most arguments, `self` not counted, of a docstring's parameters."""
    depth, parts = 0, [""]
    for character in parameters:
        depth += (character in "[(<{") - (character in "])>}")
        if character == "," and not depth:
            parts.append("")
        else:
            parts[-1] += character
    own = [part for part in parts if part.strip() and not part.strip().startswith("self")]
    return [sum("=" not in part for part in own), len(own)]


def accepts(overloads: list[Arity], num_arguments: int) -> bool:
    """Return whether some overload takes that many arguments."""
    return any(least <= num_arguments <= most for least, most in overloads)


def extract(wheel: Path, members: Iterable[str]) -> tuple[str, Signatures]:
    """Return the version of the bindings in a wheel and those of the members that they have."""
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        zipfile.ZipFile(wheel).extractall(directory)
        version = wheel.name.split("-")[1]
        for library, functions in _STUBS.items():
            source = "".join(f"void* {function}(void) {{ return 0; }}\n" for function in functions)
            soname = f"lib{library}.so.{version.split('.')[0]}"
            compiler = ["cc", "-shared", "-fPIC", f"-Wl,-soname,{soname}", "-x", "c", "-", "-o", directory / soname]
            subprocess.run(compiler, input=source.encode(), check=True)
        command = [sys.executable, "-m", "tests.backends.tensorrt.signatures", "--read", str(directory)]
        done = subprocess.run(
            command, input=json.dumps(list(members)), stdout=subprocess.PIPE, text=True, check=True, cwd=ROOT
        )
        return version, json.loads(done.stdout)


def _read(directory: Path) -> None:
    """Print the signatures of the bindings that lie in `directory`; runs in a process of its own."""
    import ctypes

    for library in directory.glob("lib*.so.*"):
        ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL)
    sys.path.insert(0, str(directory / "tensorrt_bindings"))
    import tensorrt

    found = {member: signature_of(tensorrt, member) for member in json.load(sys.stdin)}
    print(json.dumps({member: overloads for member, overloads in found.items() if overloads is not None}))


def _main(wheels: list[Path]) -> None:
    from llmengine.backends.tensorrt.library import load_library
    from tests.backends.tensorrt.used_calls import used_calls

    with tempfile.TemporaryDirectory() as name:
        members = sorted(used_calls(load_library(), Path(name)))
    tables = dict(sorted(extract(wheel, members) for wheel in wheels))
    rows = ",\n".join(
        f'  "{version}": {{\n'
        + ",\n".join(f'    "{member}": {json.dumps(arities)}' for member, arities in table.items())
        + "\n  }"
        for version, table in tables.items()
    )
    TABLE.write_text(f"{{\n{rows}\n}}\n")


if __name__ == "__main__":
    if sys.argv[1] == "--read":
        _read(Path(sys.argv[2]))
    else:
        _main([Path(argument) for argument in sys.argv[1:]])
