"""Plans in saved engines: loaded where they fit, built again where they do not, and how the command shows them."""

from __future__ import annotations

import dataclasses
import json
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from llmengine import LLM, ModelConfig, SamplingParams
from llmengine.backends.tensorrt.builder import BuiltPlan, PlanJob
from llmengine.backends.tensorrt.cache import PlanCache
from llmengine.backends.tensorrt.model_segments import segments_of
from llmengine.backends.tensorrt.obtain import obtain_plans
from llmengine.backends.tensorrt.plan_set import PlanSet
from llmengine.backends.tensorrt.spec import BuildTarget, SegmentSpec, make_profiles
from llmengine.backends.tensorrt.verify import SegmentCheck, Verification
from llmengine.backends.tensorrt.verify_engine import verify_on_device
from llmengine.checkpoints.model_saving import save_model
from llmengine.checkpoints.opening import open_model
from llmengine.checkpoints.saved_files import SavedFile
from llmengine.cli.main import main
from llmengine.errors import ConfigError, CorruptFileError, EngineError
from llmengine.quantization.model_formats import DENSE_MODEL
from tests import ROOT
from tests.backends.tensorrt.fake_runtime import FakeTensorRt, fake_library, fake_plan_set
from tests.backends.tensorrt.plan_fakes import ARCH, RTX_89, FakeBuild, content_of, get, make_request, make_source
from tests.backends.tensorrt.segment_helpers import library_or_skip
from tests.backends.tensorrt.torch_reference import reference

PLANS = ["first", "mid", "last"]


def save_with(directory: Path, plans: PlanSet) -> None:
    """Save `ARCH` with plans."""
    source = make_source(path=directory.parent / "none")
    weights = source.weights(torch.float16)
    save_model(directory, source, weights, dtype="float16", formats=DENSE_MODEL, tokenizer=None, plans=plans.to_saved())


@pytest.fixture
def saved(tmp_path: Path) -> PlanSet:
    """The plans that were saved, as fakes, in the engine tmp_path / "e"."""
    plans = get(tmp_path / "cache-of-the-builder", FakeBuild())
    plans = plans.replace(verification={"device": "NVIDIA L4", "checks": []}, library_cache=b"kernels")
    save_with(tmp_path / "e", plans)
    return plans


def load(directory: Path, build: FakeBuild | None = None, **changes: Any) -> PlanSet:
    """Get the plans of a saved engine, with a cache of its own."""
    request = make_request(**changes)
    return get(directory.parent / "cache", build or FakeBuild(), request, open_model(directory))


def damage(path: Path, how: str) -> None:
    whole = path.read_bytes()
    middle = len(whole) // 2
    path.unlink()
    if how != "missing":
        flipped = whole[:middle] + bytes([whole[middle] ^ 4]) + whole[middle + 1 :]
        path.write_bytes({"truncated": whole[:-1], "empty": b"", "flipped": flipped, "swapped": whole[::-1]}[how])


def test_plans_come_back_with_what_is_known_about_them(
    tmp_path: Path, saved: PlanSet, caplog: pytest.LogCaptureFixture
) -> None:
    files = sorted(path.relative_to(tmp_path / "e").as_posix() for path in (tmp_path / "e" / "plans").iterdir())
    assert files == ["plans/first.plan", "plans/last.plan", "plans/library.cache", "plans/mid.plan"]
    build = FakeBuild()
    loaded = load(tmp_path / "e", build)
    assert build.built == []
    assert (loaded.producer, loaded.segments) == (saved.producer, saved.segments)
    assert (loaded.verification, loaded.library_cache) == (saved.verification, b"kernels")
    assert content_of(loaded) == content_of(saved)
    assert [plan.build_s for plan in loaded.plans.values()] == [0.25] * 3
    assert not caplog.records
    save_with(tmp_path / "e", loaded)
    assert content_of(load(tmp_path / "e", build)) == content_of(saved)
    assert build.built == []


def test_plans_for_more_than_is_needed_fit(tmp_path: Path) -> None:
    several = dataclasses.replace(RTX_89, target=BuildTarget((80, 89, 120)))
    request = make_request(producer=several, max_batch_size=8, max_tokens_per_step=64, weight_mode="constants")
    save_with(tmp_path / "e", get(tmp_path / "first", FakeBuild(), request))
    build = FakeBuild()
    loaded = load(tmp_path / "e", build)
    assert build.built == []
    assert loaded.producer == several
    assert [profile.tokens.max for profile in loaded.segments[0].spec.profiles] == [8, 64]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (
            {"producer": dataclasses.replace(RTX_89, flavour="tensorrt")},
            "they were built by tensorrt_rtx, and tensorrt is installed here",
        ),
        (
            {"producer": dataclasses.replace(RTX_89, version="1.8")},
            "they were built by tensorrt_rtx 1.7.1, and 1.8 is installed here",
        ),
        (
            {"producer": dataclasses.replace(RTX_89, target=BuildTarget((120,)))},
            "they were built for SM89, not for SM120",
        ),
        (
            {"producer": dataclasses.replace(RTX_89, device_name="NVIDIA L4")},
            "they were measured on None, and the GPU here is 'NVIDIA L4'",
        ),
        ({"dtype": "bfloat16"}, "they compute in float16, not in bfloat16"),
        ({"weight_mode": "constants"}, "they have their weights as inputs, not as constants"),
        (
            {"max_batch_size": 5},
            "they take up to 4 tokens (decode) and 16 tokens (prefill), and 5 tokens (decode) and 16 tokens (prefill) "
            "are needed",
        ),
        (
            {"producer": dataclasses.replace(RTX_89, version="1.8", target=BuildTarget((120,))), "dtype": "bfloat16"},
            "they were built by tensorrt_rtx 1.7.1, and 1.8 is installed here; they were built for SM89, not for SM120"
            "; they compute in float16, not in bfloat16",
        ),
    ],
)
def test_plans_that_do_not_fit_are_built_again(
    tmp_path: Path, saved: PlanSet, changes: dict[str, Any], reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    build = FakeBuild()
    loaded = load(tmp_path / "e", build, **changes)
    assert set(build.built) == set(loaded.plans)
    assert (loaded.verification, loaded.library_cache) == (None, None)
    assert loaded.producer == changes.get("producer", RTX_89)
    assert caplog.messages == [f"{tmp_path / 'e'}: saved plans have to be rebuilt: {reason}"]
    load(tmp_path / "e", build, **changes)
    assert len(build.built) == len(loaded.plans), "the second time they are in the cache"


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("how", ["missing", "truncated", "empty", "flipped", "swapped"])
def test_a_damaged_plan_is_built_again_and_no_other(
    tmp_path: Path, saved: PlanSet, name: str, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    damage(tmp_path / "e" / "plans" / f"{name}.plan", how)
    build = FakeBuild()
    loaded = load(tmp_path / "e", build)
    assert build.built == [name]
    assert loaded.verification is None
    assert f"{name}.plan: {'is missing' if how == 'missing' else 'has '}" in caplog.text
    mine, theirs = content_of(loaded), content_of(saved)
    assert [other for other in PLANS if mine[other] == theirs[other]] == [other for other in PLANS if other != name]


def test_a_damaged_library_cache_is_only_lost(tmp_path: Path, saved: PlanSet, caplog: pytest.LogCaptureFixture) -> None:
    damage(tmp_path / "e" / "plans" / "library.cache", "flipped")
    build = FakeBuild()
    loaded = load(tmp_path / "e", build)
    assert (build.built, loaded.library_cache) == ([], None)
    assert loaded.verification == saved.verification
    assert "the library's cache is ignored" in caplog.text


def test_measurements_of_a_saved_engine_are_where_a_build_looks_for_them(tmp_path: Path) -> None:
    producer = dataclasses.replace(RTX_89, flavour="tensorrt", device_name="NVIDIA L4")
    plans = get(tmp_path / "first", FakeBuild(), make_request(producer=producer))
    save_with(tmp_path / "e", plans.replace(library_cache=b"timings"))
    found: list[bytes] = []

    def build(jobs: Iterable[PlanJob], num_processes: int) -> Iterator[BuiltPlan]:
        for job in jobs:
            assert job.timing_cache is not None
            found.append(job.timing_cache.read_bytes())
            yield from FakeBuild()([job], num_processes)

    request = make_request(producer=producer, max_batch_size=5)
    obtain_plans(request, open_model(tmp_path / "e"), 1, cache=PlanCache(tmp_path / "new"), build=build)
    assert found == [b"timings"] * 3


def test_facts_that_this_version_cannot_read_are_no_obstacle(
    tmp_path: Path, saved: PlanSet, caplog: pytest.LogCaptureFixture
) -> None:
    source = open_model(tmp_path / "e")
    assert source.plans is not None
    for facts in ({**source.plans.facts, "flavour": "other"}, {}, {**source.plans.facts, "plans": {"first": {}}}):
        changed = dataclasses.replace(source, plans=dataclasses.replace(source.plans, facts=facts))
        build = FakeBuild()
        get(tmp_path / f"cache{len(caplog.records)}", build, source=changed)
        assert build.built == PLANS
    assert len(caplog.records) == 3


def test_plans_that_cannot_be_built_again_say_why_the_saved_ones_are_not_used(tmp_path: Path, saved: PlanSet) -> None:
    damage(tmp_path / "e" / "plans" / "mid.plan", "missing")
    with pytest.raises(ConfigError, match="no library") as caught:
        load(tmp_path / "e", FakeBuild(0, ConfigError("no library")))
    assert "mid.plan: is missing" in caught.value.__notes__[0]


def test_damaged_weights_are_refused_whatever_the_plans(tmp_path: Path, saved: PlanSet) -> None:
    damage(tmp_path / "e" / "weights.rank0.safetensors", "flipped")
    with pytest.raises(CorruptFileError, match=r"weights\.rank0\.safetensors: has sha256"):
        load(tmp_path / "e", weight_mode="constants")


def test_the_torch_backend_loads_an_engine_with_plans(tmp_path: Path, saved: PlanSet) -> None:
    damage(tmp_path / "e" / "plans" / "mid.plan", "missing")
    with LLM(ModelConfig(tmp_path / "e", device="cpu", backend="torch"), enable_tokenizer=False) as llm:
        [output] = llm.generate([[3, 4, 5]], SamplingParams(max_new_tokens=4, ignore_eos=True))
        assert len(output.token_ids) == 4
        llm.save(tmp_path / "again")
    assert open_model(tmp_path / "again").plans is None


def test_a_plan_that_changed_since_is_not_saved(tmp_path: Path, saved: PlanSet) -> None:
    loaded = load(tmp_path / "e")
    before = (tmp_path / "e" / "engine.json").read_bytes()
    damage(tmp_path / "e" / "plans" / "mid.plan", "flipped")
    with pytest.raises(CorruptFileError, match=r"mid\.plan.*altered"):
        save_with(tmp_path / "e", loaded)
    damage(tmp_path / "e" / "plans" / "mid.plan", "missing")
    with pytest.raises(EngineError, match=r"saving failed, the directory is as it was before: .*mid\.plan"):
        save_with(tmp_path / "e", loaded)
    assert (tmp_path / "e" / "engine.json").read_bytes() == before
    assert sorted(path.name for path in tmp_path.glob(".e.*")) == []


def test_inspect_and_verify_show_an_engine(tmp_path: Path, saved: PlanSet, capsys: pytest.CaptureFixture[str]) -> None:
    engine = tmp_path / "e"
    assert main(["inspect", str(engine)]) == 0
    out = capsys.readouterr().out
    assert "tensorrt_rtx 1.7.1, compute capability 8.9" in out
    assert "decode to 4 tokens, prefill to 16 tokens; weights as inputs" in out
    assert "verified    no: the record of it is from another version" in out
    assert "sample_tokens int32 [S]" in out
    assert main(["inspect", str(engine), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert list(facts["plans"]["plans"]) == PLANS
    assert facts["size_bytes"] == sum(entry["size_bytes"] for entry in facts["files"].values())

    assert main(["verify", str(engine)]) == 0
    out = capsys.readouterr().out
    assert out.count("ok   ") == 6
    assert "plans: not run on a GPU: " in out


def test_inspect_tells_whether_plans_passed(tmp_path: Path, saved: PlanSet, capsys: pytest.CaptureFixture[str]) -> None:
    good = SegmentCheck("mid", "qkv", 4, 1, 0.5, 1.0, 0.5, 1.0, 0.5, 1.0, finite=True)
    bad = dataclasses.replace(good, output="x_out", rms_error=2.0)
    for checks, text in (((good,), "1 outputs agree with torch; dense"), ((good, bad), "FAILED on NVIDIA L4")):
        found = Verification("tensorrt_rtx 1.7.1", "NVIDIA L4", "2026-11-22", checks, {8: (90.0, 120.0)})
        save_with(tmp_path / "e", saved.replace(verification=found.to_dict()))
        assert main(["inspect", str(tmp_path / "e")]) == 0
        assert text in capsys.readouterr().out


@pytest.mark.parametrize("name", ["plans/mid.plan", "weights.rank0.safetensors", "plans/library.cache"])
def test_verify_names_every_damaged_file(
    tmp_path: Path, saved: PlanSet, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    damage(tmp_path / "e" / name, "flipped")
    damage(tmp_path / "e" / "plans" / "first.plan", "truncated")
    assert main(["verify", str(tmp_path / "e")]) == 1
    out = capsys.readouterr().out
    assert f"BAD  {tmp_path / 'e' / name}: has sha256" in out
    assert "first.plan: has" in out
    assert "not run on a GPU: the files are not sound" in out
    assert main(["verify", str(tmp_path / "e"), "--json"]) == 1
    findings = json.loads(capsys.readouterr().out)
    assert [file for file, problem in findings["files"].items() if problem] == sorted(
        (name, "plans/first.plan"), key=list(findings["files"]).index
    )


def test_verify_finds_plans_of_another_version(
    tmp_path: Path, saved: PlanSet, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llmengine.backends.tensorrt.spec.NETWORK_VERSION", 999)
    assert main(["verify", str(tmp_path / "e")]) == 1
    assert capsys.readouterr().out.count("was built from another network than this version of llmengine defines") == 3


@pytest.mark.parametrize("mode", ["inputs", "constants"])
def test_plans_of_an_engine_are_run_where_they_can_be(tmp_path: Path, device: str, mode: Any) -> None:
    """A stand-in for TensorRT runs them, since the machines of the tests can run no plan."""
    source = make_source(path=tmp_path)
    weights = {name: tensor.to(device) for name, tensor in source.weights(torch.float16)}
    plans = fake_plan_set(segments_of(ARCH, "float16", make_profiles(4, 16), mode), weights)
    save_with(tmp_path / "e", plans)
    loaded = open_model(tmp_path / "e")
    place = torch.device(device)
    problems, text = verify_on_device(plans, loaded, fake_library(FakeTensorRt(place)), place)
    assert problems == []
    assert text.startswith("run on ")
    assert "outputs compared" in text

    def wrong(spec: SegmentSpec, feeds: Any) -> Any:
        return {name: value * 1.1 for name, value in reference(spec, feeds, torch.float16).items()}

    problems, _ = verify_on_device(plans, loaded, fake_library(FakeTensorRt(place, wrong)), place)
    assert any("logits" in problem for problem in problems)
    fake = FakeTensorRt(place)
    fake.failing.add("deserialize_cuda_engine")
    problems, text = verify_on_device(plans, loaded, fake_library(fake), place)
    assert "cannot be loaded" in problems[0]
    assert text.endswith("failed")


@pytest.mark.parametrize("command", ["inspect", "verify"])
def test_what_is_no_engine_is_one_line(tmp_path: Path, command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, str(tmp_path)]) == 1
    assert capsys.readouterr().err == f"llmengine: {tmp_path} is not a saved engine: it has no engine.json\n"
    (tmp_path / "engine.json").write_text('{"format_version": 99}')
    assert main([command, str(tmp_path)]) == 1
    assert "format_version 99 is from a newer llmengine" in capsys.readouterr().err
    assert main([command, "x" * 300]) == 1
    assert "xxx cannot be read: File name too long" in capsys.readouterr().err


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A directory from which a tiny model with random weights is made."""
    config = {
        **{"architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "float16"},
        **{"num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-5},
        **{"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "max_position_embeddings": 128},
        **{"hidden_act": "silu", "tie_word_embeddings": False},
    }
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    return tmp_path / "model"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's cache directory, empty."""
    monkeypatch.setenv("LLMENGINE_CACHE_DIR", str(tmp_path / "user-cache"))
    return tmp_path / "user-cache"


def test_build_for_another_machine(
    model: Path, cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    library = library_or_skip()
    if not library.features.target_capabilities:
        pytest.skip(f"{library} builds for the device at hand only")
    engine = tmp_path / "engine"
    command = ["build", str(model), "-o", str(engine), "--dummy", "--max-batch-size", "4"]
    limits = ["--max-tokens-per-step", "32"]
    assert main([*command, *limits, "--sm", "8.9,120"]) == 0
    printed = capsys.readouterr()
    assert f"built with {library} for SM89, SM120" in printed.out
    assert "no plan was run" in printed.out
    assert "[3/3] " in printed.err
    assert main(["verify", str(engine)]) == 0
    assert "not run on a GPU" in capsys.readouterr().out
    first = open_model(engine).plans
    assert first is not None
    assert all(isinstance(file, SavedFile) and file.size_bytes > 1000 for file in first.files.values())

    # A second build finds the plans; a build from the saved engine takes its plans, weights and limits.
    assert main([*command, *limits, "--sm", "89,120"]) == 0
    assert "building" not in capsys.readouterr().err
    copy = ["build", str(engine), "-o", str(tmp_path / "copy"), "--sm", "89", *command[-2:], *limits]
    assert main(copy) == 0
    second = open_model(tmp_path / "copy").plans
    assert second is not None
    assert second.facts == first.facts
    assert not caplog.records
    with LLM(ModelConfig(tmp_path / "copy", device="cpu", backend="torch"), enable_tokenizer=False) as llm:
        assert len(llm.generate([[3, 4, 5]], SamplingParams(max_new_tokens=4, ignore_eos=True))[0].token_ids) == 4


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["--sm", "77"], 2, "does not support compute capability 7.7"),
        (["--sm", "89", "--flavour", "tensorrt"], 2, "install tensorrt instead"),
        (["--sm", "89", "--weights", "fastest"], 2, "weight_mode='fastest' measures on this machine's GPU"),
        (
            ["--sm", "89", "--max-batch-size", "9", "--max-tokens-per-step", "8"],
            2,
            "max_tokens_per_step must be at least max_batch_size=9, not 8",
        ),
    ],
)
def test_builds_that_cannot_be(
    model: Path, cache: Path, arguments: list[str], status: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if not library_or_skip().features.target_capabilities:
        pytest.skip("builds for the device at hand only")
    output = model.parent / "engine"
    assert main(["build", str(model), "-o", str(output), "--dummy", *arguments]) == status
    assert message in capsys.readouterr().err
    assert not output.exists()


def test_a_build_does_not_begin_if_its_directory_is_taken(
    model: Path, cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    assert main(["build", str(model), "-o", str(tmp_path / "mine"), "--dummy", "--sm", "89"]) == 2
    assert "is neither empty nor a saved engine" in capsys.readouterr().err
    assert not cache.exists()


def test_the_commands_of_the_guide_run(
    tmp_path: Path, saved: PlanSet, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not library_or_skip().features.target_capabilities:
        pytest.skip("builds for the device at hand only")
    guide = (ROOT / "docs" / "tensorrt.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```sh\n(.*?)^```$", guide, re.MULTILINE | re.DOTALL)
    commands = [line for block in blocks for line in block.splitlines() if line.startswith("llmengine ")]
    assert {command.split()[1] for command in commands} == {"build", "inspect", "verify"}
    (tmp_path / "e").rename(tmp_path / "my-model")
    monkeypatch.chdir(tmp_path)
    for command in commands:
        assert main(shlex.split(command)[1:]) == 0, command


def test_the_guide_lists_every_file() -> None:
    guide = (ROOT / "docs" / "tensorrt.md").read_text(encoding="utf-8")
    listed = re.findall(r"^\| `(\w+)` \|", guide.partition("## The files of")[2], re.MULTILINE)
    files = (ROOT / "llmengine" / "backends" / "tensorrt").glob("*.py")
    assert sorted(listed) == sorted(file.stem for file in files if file.stem != "__init__")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_target_must_be_named(model: Path, cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    library_or_skip()
    assert main(["build", str(model), "-o", str(model.parent / "engine"), "--dummy"]) == 2
    assert "there is no GPU to build for; give compute_capabilities (--sm)" in capsys.readouterr().err


BUILD_THAT_STOPS_AT_ITS_FIRST_PLAN = """
import sys, time
from llmengine.backends.tensorrt.build_progress import BuildProgress
from llmengine.cli.main import main

def finish_and_wait(*arguments):
    finished(*arguments)
    time.sleep(600)

finished, BuildProgress.finished = BuildProgress.finished, finish_and_wait
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_build_goes_on_where_it_was(
    model: Path, cache: Path, how: signal.Signals, capsys: pytest.CaptureFixture[str]
) -> None:
    if not library_or_skip().features.target_capabilities:
        pytest.skip("builds for the device at hand only")
    output = model.parent / "engine"
    arguments = ["build", str(model), "-o", str(output), "--dummy", "--sm", "89", "--weights", "constants"]
    command = [sys.executable, "-c", BUILD_THAT_STOPS_AT_ITS_FIRST_PLAN, *arguments]
    # A shell that runs the tests in its background has them ignore the signal, and children inherit that.
    heed = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    with subprocess.Popen(command, stderr=subprocess.PIPE, preexec_fn=heed, text=True) as process:
        assert process.stderr is not None
        assert any("[1/4]" in line for line in process.stderr)
        workers = psutil.Process(process.pid).children()
        assert any("llmengine.backends.tensorrt.builder_process" in worker.cmdline() for worker in workers)
        process.send_signal(how)
        _, err = process.communicate(timeout=60)
    assert process.returncode == (130 if how == signal.SIGINT else -signal.SIGKILL)
    assert not psutil.wait_procs(workers, timeout=30)[1], "they end with their process, however that ends"
    assert not output.exists()
    if how == signal.SIGINT:
        assert err.splitlines()[-1] == "Interrupted."
        assert not list(cache.glob("plans/build-*"))
    assert len(list(cache.glob("plans/*.plan"))) == 1
    capsys.readouterr()
    assert main(arguments) == 0
    assert capsys.readouterr().err.count("built before") == 1
    assert main(["verify", str(output)]) == 0
