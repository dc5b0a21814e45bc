"""The cache of built plans: a plan that is found is whole and the one asked for, even if a writer was killed."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import io
import json
import logging
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from llmengine.backends.tensorrt.build_progress import BuildProgress
from llmengine.backends.tensorrt.cache import PlanCache
from llmengine.backends.tensorrt.obtain import obtain_plans
from llmengine.backends.tensorrt.spec import BuildTarget
from llmengine.errors import CorruptFileError, EngineError
from tests import ROOT
from tests.backends.tensorrt.plan_fakes import ARCH, RTX_89, FakeBuild, content_of, get, make_request, make_source

INPUT_PLANS = ["first", "mid", "last"]
CONSTANT_PLANS = ["first", "mid.0", "mid.1", "mid.2", "last"]


def names(directory: Path) -> list[str]:
    return sorted(path.suffix for path in directory.iterdir())


def check_whole(directory: Path) -> None:
    """Assert that every plan in a cache is complete, and that nothing is left over but a killed build's files."""
    for path in directory.iterdir():
        if path.suffix == ".plan":
            assert hashlib.sha256(path.read_bytes()).hexdigest() == path.stem
        elif path.suffix == ".json":
            json.loads(path.read_text())
        else:
            assert path.name.startswith("build-")


def test_what_was_built_is_found_without_reading_weights(tmp_path: Path) -> None:
    def unread(dtype: Any) -> Any:
        raise AssertionError("weights were read")

    build, request = FakeBuild(), make_request()
    made = get(tmp_path, build, request, make_source(stream=unread))
    assert build.built == INPUT_PLANS
    assert list(made.plans) == INPUT_PLANS
    assert [segment.layer for segment in made.segments] == [0, 0, 1, 2, 3]
    again = get(tmp_path, build, request, make_source(stream=unread))
    assert build.built == INPUT_PLANS
    assert content_of(again) == content_of(made)
    assert names(tmp_path) == [".json"] * 3 + [".plan"] * 3


def test_constants_make_a_plan_of_each_layer_found_by_their_values(tmp_path: Path) -> None:
    build, request = FakeBuild(), make_request(weight_mode="constants")
    made = get(tmp_path, build, request)
    assert sorted(build.built) == sorted(CONSTANT_PLANS)
    assert list(made.plans) == CONSTANT_PLANS
    constants = [content["constants"] for content in content_of(made).values()]
    assert len(set(constants)) == 5
    assert content_of(get(tmp_path, build, request)) == content_of(made)
    assert len(build.built) == 5

    def changed(dtype: Any) -> Any:
        for name, tensor in make_source().stream(dtype):
            yield name, tensor + 1 if name == "layers.1.o.weight" else tensor

    get(tmp_path, build, request, make_source(stream=changed))
    assert build.built[5:] == ["mid.1"]


@pytest.mark.parametrize(
    "changes",
    [
        {"dtype": "bfloat16"},
        {"max_batch_size": 5},
        {"max_tokens_per_step": 17},
        {"arch": dataclasses.replace(ARCH, rms_norm_eps=1e-6)},
        {"producer": dataclasses.replace(RTX_89, flavour="tensorrt")},
        {"producer": dataclasses.replace(RTX_89, version="1.7.2")},
        {"producer": dataclasses.replace(RTX_89, target=BuildTarget((120,)))},
        {"producer": dataclasses.replace(RTX_89, device_name="NVIDIA L4")},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_what_matters_is_in_the_key(tmp_path: Path, changes: dict[str, Any]) -> None:
    build = FakeBuild()
    get(tmp_path, build)
    request = make_request(**changes)
    get(tmp_path, build, request, make_source(request.arch))
    assert build.built == INPUT_PLANS * 2


@pytest.mark.parametrize("suffix", [".json", ".plan"])
@pytest.mark.parametrize("damage", ["missing", "truncated", "empty", "flipped", "swapped"])
def test_damaged_files_are_built_again(
    tmp_path: Path, suffix: str, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    build = FakeBuild()
    get(tmp_path, build)
    for path in tmp_path.glob(f"*{suffix}"):
        whole = path.read_bytes()
        middle = len(whole) // 2
        flipped = whole[:middle] + bytes([whole[middle] ^ 4]) + whole[middle + 1 :]
        contents = {"truncated": whole[:-1], "empty": b"", "flipped": flipped, "swapped": whole[::-1]}
        path.unlink()
        if damage != "missing":
            path.write_bytes(contents[damage])
    content_of(get(tmp_path, build))
    assert sorted(build.built[3:]) == sorted(INPUT_PLANS)
    if (suffix, damage) != (".json", "missing"):
        assert caplog.text.count("a cached plan is ignored") == 3
    get(tmp_path, build)
    assert len(build.built) == 6


@pytest.mark.parametrize(("mode", "plans"), [("inputs", INPUT_PLANS), ("constants", CONSTANT_PLANS)])
@pytest.mark.parametrize("failure", [KeyboardInterrupt(), EngineError("out of memory")], ids=["ctrl-c", "error"])
def test_an_interrupted_build_goes_on_where_it_was(
    tmp_path: Path, mode: Any, plans: list[str], failure: BaseException
) -> None:
    request = make_request(weight_mode=mode)
    first, second = FakeBuild(2, failure), FakeBuild()
    with pytest.raises(type(failure)):
        get(tmp_path, first, request)
    assert names(tmp_path) == [".json"] * 2 + [".plan"] * 2, "no half plan, no file of weights"
    get(tmp_path, second, request)
    assert sorted(first.built + second.built) == sorted(plans)


def test_damaged_weights_end_the_build(tmp_path: Path) -> None:
    def damaged(dtype: Any) -> Any:
        yield next(make_source().stream(dtype))
        raise CorruptFileError("model.safetensors: truncated")

    with pytest.raises(CorruptFileError, match="truncated"):
        get(tmp_path, FakeBuild(), make_request(weight_mode="constants"), make_source(stream=damaged))
    assert names(tmp_path) == []


def test_a_full_disk_is_an_error_that_leaves_nothing(tmp_path: Path) -> None:
    full = FakeBuild(1, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
    with pytest.raises(EngineError, match=f"{tmp_path}.*building plans failed: No space left on device"):
        get(tmp_path, full)
    assert names(tmp_path) == [".json", ".plan"]
    get(tmp_path, FakeBuild())


def test_without_a_writable_cache_plans_are_kept_in_memory(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("not a directory")
    build = FakeBuild()
    made = get(tmp_path / "file", build)
    assert all(isinstance(plan.file.content, bytes) for plan in made.plans.values())
    content_of(made)
    assert "cannot be cached" in caplog.text
    PlanCache(tmp_path / "file").store_findings(made.replace(verification={"device": "x"}))
    get(tmp_path / "file", build)
    assert build.built == INPUT_PLANS * 2


def test_a_cache_that_cannot_be_written_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = get(tmp_path, FakeBuild())
    left = sorted(tmp_path.iterdir())

    def refuse(*_: Any, **__: Any) -> Any:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    for owner, name in ((os, "utime"), (os, "replace"), (Path, "unlink"), (tempfile, "mkdtemp")):
        monkeypatch.setattr(owner, name, refuse)
    build = FakeBuild()
    assert content_of(get(tmp_path, build)) == content_of(made)
    assert build.built == []
    PlanCache(tmp_path, limit_bytes=1).trim(made)
    assert sorted(tmp_path.iterdir()) == left
    with pytest.raises(EngineError, match="no directory for building plans: Read-only file system"):
        get(tmp_path, build, make_request(max_batch_size=3))


def builder_process(cache: Path, limits: str) -> subprocess.Popen[bytes]:
    """Start a process that says "ready" and builds for one limit after the other."""
    code = f"""
import sys, itertools
sys.path[:0] = {[str(ROOT)]!r}
from pathlib import Path
from tests.backends.tensorrt import plan_fakes as fakes
print("ready", flush=True)
for tokens in {limits}:
    plans = fakes.get(Path(sys.argv[1]), fakes.FakeBuild(), fakes.make_request(max_tokens_per_step=tokens))
    fakes.content_of(plans)
"""
    process = subprocess.Popen([sys.executable, "-c", code, str(cache)], stdout=subprocess.PIPE)
    assert process.stdout is not None
    return process


def test_processes_that_build_the_same_at_once(tmp_path: Path) -> None:
    processes = [builder_process(tmp_path, "range(16, 36)") for _ in range(3)]
    assert [process.communicate(timeout=60) for process in processes] == [(b"ready\n", None)] * 3
    assert [process.returncode for process in processes] == [0] * 3
    check_whole(tmp_path)
    build = FakeBuild()
    for tokens in range(16, 36):
        content_of(get(tmp_path, build, make_request(max_tokens_per_step=tokens)))
    assert build.built == []


def test_threads_that_build_the_same_at_once(tmp_path: Path) -> None:
    builds = [FakeBuild() for _ in range(8)]
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda build: get(tmp_path, build), builds))
    for plan_set in made:
        content_of(plan_set)
    check_whole(tmp_path)
    last = FakeBuild()
    content_of(get(tmp_path, last))
    assert last.built == []


def test_a_killed_build_leaves_whole_plans_only(tmp_path: Path) -> None:
    chance = random.Random(0)
    for _ in range(4):
        with builder_process(tmp_path, "itertools.count(16)") as process:
            assert process.stdout is not None
            assert process.stdout.readline() == b"ready\n"
            time.sleep(chance.uniform(0.0, 0.1))
            process.send_signal(signal.SIGKILL)
        check_whole(tmp_path)
        content_of(get(tmp_path, FakeBuild()))


def test_files_of_killed_builds_are_removed_a_day_later(tmp_path: Path) -> None:
    for name, age_s in [("build-old", 90_000), ("build-now", 0)]:
        (tmp_path / name).mkdir()
        (tmp_path / name / "mid.weights").write_bytes(b"x" * 100)
        os.utime(tmp_path / name, (time.time() - age_s,) * 2)
    get(tmp_path, FakeBuild())
    assert [path.name for path in tmp_path.glob("build-*")] == ["build-now"]


def test_the_cache_stays_within_its_limit(tmp_path: Path) -> None:
    build = FakeBuild()
    size_bytes = get(tmp_path, build).size_bytes
    for path in tmp_path.iterdir():
        os.utime(path, (1e9, 1e9))
    cache = PlanCache(tmp_path, limit_bytes=size_bytes // 2)
    made = obtain_plans(make_request(max_batch_size=3), make_source(), 1, cache=cache, build=build)
    content_of(made)
    assert len(list(tmp_path.glob("*.plan"))) == 3, "those of this build stay, whatever the limit"
    get(tmp_path, build)
    assert build.built == INPUT_PLANS * 3


def test_what_was_found_out_about_plans_is_remembered(tmp_path: Path) -> None:
    build = FakeBuild()
    made = get(tmp_path, build)
    assert (made.verification, made.library_cache) == (None, None)
    PlanCache(tmp_path).store_findings(made.replace(verification={"device": "L4"}, library_cache=b"kernels"))
    again = get(tmp_path, build)
    assert (again.verification, again.library_cache) == ({"device": "L4"}, b"kernels")
    other = get(tmp_path, build, make_request(max_batch_size=3))
    assert (other.verification, other.library_cache) == (None, None)


def test_a_build_reports_names_sizes_and_times(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "llmengine.tensorrt")
    request = make_request(weight_mode="constants")
    with pytest.raises(KeyboardInterrupt):
        get(tmp_path, FakeBuild(2), request)
    caplog.clear()
    get(tmp_path, FakeBuild(), request)
    lines = [record.getMessage() for record in caplog.records]
    assert lines[0] == "building 5 plans with tensorrt_rtx 1.7.1 for SM89: first, mid.0, mid.1, mid.2, last"
    assert len(lines) == 6
    assert sum("built before" in line for line in lines) == 2
    assert lines[-1].startswith("[5/5] ")
    assert "0.25 s, peak memory 1.05 MB" in lines[-1]


def test_a_terminal_gets_a_bar_that_goes_away(tmp_path: Path) -> None:
    out = io.StringIO()
    now = iter(range(100))
    terminal = Console(file=out, force_terminal=True, width=100, highlight=False)
    progress = BuildProgress(print, terminal, clock=lambda: next(now))
    request = make_request(weight_mode="constants")
    cache = PlanCache(tmp_path)
    obtain_plans(request, make_source(), 1, cache=cache, progress=progress, build=FakeBuild())
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", out.getvalue())
    assert [f"[{index}/5] " in text for index in range(7)] == [False, *[True] * 5, False]
    assert "about 1 s left" in text
    hide, show = "\x1b[?25l", "\x1b[?25h"
    assert out.getvalue().count(hide) == out.getvalue().count(show) == 1
    assert "mid" not in text[text.rindex("\n") :], "nothing is left on the last line"
