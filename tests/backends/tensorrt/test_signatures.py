"""Every use of TensorRT fits the signatures of the installed library, and the tables of other versions.

The tables come from NVIDIA's bindings by `signatures.py`, which says how to write them again.
"""

from __future__ import annotations

import inspect
import json
from pathlib import Path

import pytest

import tests.backends.tensorrt.fake_runtime as fake_runtime
from tests.backends.tensorrt.segment_helpers import library_or_skip
from tests.backends.tensorrt.signatures import TABLE, Signatures, accepts, arity_of, signature_of
from tests.backends.tensorrt.used_calls import PROTOCOLS, Calls, mentioned_names, used_calls

TABLES: dict[str, Signatures] = json.loads(TABLE.read_text())

ONLY_RTX = (
    "BuilderFlag.REQUIRE_USER_ALLOCATION",
    "ComputeCapability",
    "CudaGraphStrategy",
    "DynamicShapesKernelSpecializationStrategy",
    "IBuilderConfig.num_compute_capabilities",
    "IBuilderConfig.set_compute_capability",
    "IRuntimeCache",
    "IRuntimeConfig.create_runtime_cache",
    "IRuntimeConfig.cuda_graph_strategy",
    "IRuntimeConfig.dynamic_shapes_kernel_specialization_strategy",
    "IRuntimeConfig.set_runtime_cache",
)
"""Members, and classes with all of theirs, that are used only where `Features` say that they exist."""

COMMON_WORDS = {"builder", "log", "name", "type", "value", "weights"}
"""Names of the library's members that are also names of ours."""


@pytest.fixture(scope="module")
def calls(tmp_path_factory: pytest.TempPathFactory) -> Calls:
    return used_calls(library_or_skip(), tmp_path_factory.mktemp("build"))


FAKES = {
    "Runtime": "FakeRuntime",
    "ICudaEngine": "FakeEngine",
    "IExecutionContext": "FakeContext",
    "IRuntimeConfig": "FakeRuntimeConfig",
    "IRuntimeCache": "FakeCache",
}


def is_only_rtx(member: str) -> bool:
    return member in ONLY_RTX or member.split(".")[0] in ONLY_RTX


@pytest.mark.parametrize("version", list(TABLES))
def test_calls_fit_the_signatures_of_tensorrt(calls: Calls, version: str) -> None:
    table = TABLES[version]
    missing = [member for member in calls if member not in table and not is_only_rtx(member)]
    assert not missing, "not in this version, or the table is old: see signatures.py"
    wrong = {
        member: (numbers, table[member])
        for member, numbers in calls.items()
        if member in table and not all(accepts(table[member], number) for number in numbers)
    }
    assert not wrong
    assert not [member for member in table if member not in calls], "no longer used: see signatures.py"
    assert not [member for member in table if is_only_rtx(member)]


def test_calls_fit_the_signatures_of_the_installed_library(calls: Calls) -> None:
    library = library_or_skip()
    for member, numbers in calls.items():
        overloads = signature_of(library.trt, member)
        if overloads is None:
            assert is_only_rtx(member), member
            continue
        assert all(accepts(overloads, number) for number in numbers), (member, numbers, overloads)


def test_no_member_is_used_that_was_not_found(calls: Calls) -> None:
    trt = library_or_skip().trt
    classes = [getattr(trt, name) for name in {member.split(".")[0] for member in calls} if name.startswith("I")]
    known = {name for cls in (*classes, trt.Builder, trt.Runtime) for name in dir(cls) if not name.startswith("_")}
    found = {member.split(".")[-1] for member in calls}
    assert (mentioned_names() & known) - found <= COMMON_WORDS


@pytest.mark.parametrize(("protocol", "name"), PROTOCOLS.items())
def test_the_fake_has_the_same_interface(protocol: type, name: str) -> None:
    fake = getattr(fake_runtime, FAKES[name])
    for method, function in inspect.getmembers(protocol, inspect.isfunction):
        if not method.startswith("_"):
            assert len(inspect.signature(getattr(fake, method)).parameters) == len(
                inspect.signature(function).parameters
            )


@pytest.mark.parametrize(
    ("parameters", "expected"),
    [
        ("self: a.B", [0, 0]),
        ("self: a.B, flags: typing.SupportsInt = 0", [0, 1]),
        ("self: B, x: dict[str, int], y: tuple[int, ...], z: S = <S.STATIC: 0>", [2, 3]),
    ],
)
def test_docstrings_are_read_right(parameters: str, expected: list[int]) -> None:
    assert arity_of(parameters) == expected


def test_tables_are_of_both_lines_of_tensorrt() -> None:
    assert [version.split(".")[:2] for version in TABLES] == [["10", "16"], ["11", "4"]]
    assert Path(TABLE).stat().st_size < 50_000
