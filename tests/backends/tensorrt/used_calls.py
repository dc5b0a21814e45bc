"""Members of TensorRT that the package uses, and with how many arguments: found by running it and by reading it.

Definitions and builds run on the real library through proxies that write down each access. The runtime cannot run
without a GPU; its use is what the protocols of `runtime.py` say, and mypy holds the code to them.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
import warnings
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

import llmengine.backends.tensorrt as package
from llmengine.backends.tensorrt import library, runtime
from llmengine.backends.tensorrt.builder_process import serialize_segment
from llmengine.backends.tensorrt.library import Library
from llmengine.backends.tensorrt.spec import BuildTarget
from tests.backends.tensorrt.quantized_helpers import FORMATS, model_formats, quantized_arch, quantized_segment
from tests.backends.tensorrt.segment_helpers import FAMILIES, placed, random_weights, raw, tiny_arch

Calls = dict[str, set[int]]
"""Member ("INetworkDefinition.add_cast") -> the numbers of arguments that it is called with; empty for no call."""

PROTOCOLS = {
    runtime.TrtRuntime: "Runtime",
    runtime.TrtEngine: "ICudaEngine",
    runtime.TrtContext: "IExecutionContext",
    runtime.TrtRuntimeConfig: "IRuntimeConfig",
    runtime.TrtRuntimeCache: "IRuntimeCache",
}
MODULES = ("builder_process", "graph", "library", "network", "products", "runtime")
SOURCES = [Path(package.__path__[0]) / f"{name}.py" for name in MODULES]


def used_calls(library: Library, directory: Path) -> Calls:
    """Return all members that are used; `directory` takes temporary files."""
    calls = recorded_calls(library, directory)
    for member in (*protocol_members(), *named_members()):
        calls[member[0]] |= member[1]
    return dict(sorted(calls.items()))


def recorded_calls(library: Library, directory: Path) -> Calls:
    """Return the members that defining and building segments uses, in every weight mode and with a timing cache."""
    calls: Calls = defaultdict(set)
    features = dataclasses.replace(library.features, timing_cache=True)
    recording = dataclasses.replace(library, trt=Proxy(library.trt, calls), features=features)
    for mode in ("inputs", "constants"):
        for kind in ("first", "mid", "last"):
            arch = tiny_arch(**FAMILIES["gemma2"], **{"mlp_bias": True, "attention_bias": True})
            segment, weights = placed(arch, "float16", mode, kind), random_weights(arch, torch.float16)
            names = segment.weight_names()
            constants = {w.name: raw(weights[names[w.name]]) for w in segment.spec.weights if w.source == "constant"}
            with warnings.catch_warnings(
                action="ignore", category=DeprecationWarning
            ):  # timing caches, in tensorrt_rtx
                serialize_segment(recording, segment.spec, BuildTarget((89,)), constants, directory / "timings")
    silu = placed(tiny_arch(), "bfloat16", "inputs", "mid")
    serialize_segment(recording, silu.spec, BuildTarget((89,)), {})
    for name in ("int4-128, act-order, AWQ", "w8a8, one scale", "fp8-block", "stacked"):
        quantized = quantized_segment(quantized_arch(), "float16", "inputs", "mid", model_formats(FORMATS[name]))
        serialize_segment(recording, quantized.spec, BuildTarget((89,)), {})
    return calls


def protocol_members() -> Iterator[tuple[str, set[int]]]:
    """Yield the members that the runtime's protocols declare."""
    for protocol, name in PROTOCOLS.items():
        for attribute in inspect.get_annotations(protocol):
            yield f"{name}.{attribute}", set()
        for method, function in inspect.getmembers(protocol, inspect.isfunction):
            if not method.startswith("_"):
                yield f"{name}.{method}", {len(inspect.signature(function).parameters) - 1}


def named_members() -> Iterator[tuple[str, set[int]]]:
    """Yield the members that the sources spell out after the module's name, and those required of a library."""
    for source in SOURCES:
        tree = ast.parse(source.read_text())
        scopes = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
        for scope in (tree, *scopes):
            aliases = aliases_in(scope)
            for node in ast.walk(scope):
                if isinstance(node, ast.Call) and (name := after_module(node.func, aliases)):
                    is_unbound = name.endswith(".__init__")  # with `self` as an argument
                    yield (name if "." in name else f"{name}.__init__"), {len(node.args) - is_unbound}
                elif name := after_module(node, aliases):
                    yield name, set()
    for member in library._REQUIRED:
        yield member, set()


def mentioned_names() -> set[str]:
    """Return all names of attributes and all texts in the sources, which include calls that nothing recorded."""
    nodes = [node for source in SOURCES for node in ast.walk(ast.parse(source.read_text()))]
    attributes = {node.attr for node in nodes if isinstance(node, ast.Attribute)}
    return attributes | {node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)}


def aliases_in(scope: ast.AST) -> dict[str, str]:
    """Return variable -> "Class" for assignments like `flag = library.trt.Class`."""
    return {
        node.targets[0].id: name
        for node in ast.walk(scope)
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and (name := after_module(node.value))
    }


def after_module(node: ast.AST, aliases: Mapping[str, str] = MappingProxyType({})) -> str:
    """Return "Class.member" of an expression like `library.trt.Class.member`, "" for any other."""
    text = ast.unparse(node)
    root, _, rest = text.partition(".")
    if root in aliases and re.fullmatch(r"[\w.]+", rest):
        return f"{aliases[root]}.{rest}"
    match = re.fullmatch(r"(?:[\w.]+\.)?_?trt\.((?:\w+\.)*\w+)", text)
    return "" if match is None or match[1] == "__version__" else match[1]


class Proxy:
    """Stands for an object of the library and records which members are used."""

    __slots__ = ("_calls", "_object")

    def __init__(self, wrapped: Any, calls: Calls) -> None:
        object.__setattr__(self, "_object", wrapped)
        object.__setattr__(self, "_calls", calls)

    def __getattr__(self, name: str) -> Any:
        self._calls[self._member(name)] |= set()
        value = getattr(self._object, name)
        if inspect.isroutine(value):
            return lambda *arguments: self._call(name, value, arguments)
        return self._wrap(value)

    def __setattr__(self, name: str, value: Any) -> None:
        self._calls[self._member(name)] |= set()
        setattr(self._object, name, _unwrap(value))

    def __call__(self, *arguments: Any) -> Any:
        return self._call("__init__", self._object, arguments)

    def __eq__(self, other: object) -> bool:
        return bool(self._object == _unwrap(other))

    def __hash__(self) -> int:
        return hash(self._object)

    def __int__(self) -> int:
        return int(self._object)

    def _call(self, name: str, function: Any, arguments: tuple[Any, ...]) -> Any:
        self._calls[self._member(name)].add(len(arguments))
        return self._wrap(function(*map(_unwrap, arguments)))

    def _member(self, name: str) -> str:
        if inspect.ismodule(self._object):
            return name
        owner = self._object if isinstance(self._object, type) else type(self._object)
        return f"{owner.__name__}.{name}"

    def _wrap(self, value: Any) -> Any:
        owner = value if isinstance(value, type) else type(value)
        is_plain = not owner.__module__.startswith("tensorrt") or owner.__name__ in ("Dims", "IHostMemory")
        return value if is_plain else Proxy(value, self._calls)


def _unwrap(value: Any) -> Any:
    if isinstance(value, Proxy):
        return value._object
    if isinstance(value, (list, tuple)):
        return type(value)(map(_unwrap, value))
    return value
