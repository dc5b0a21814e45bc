"""Engine directories: a saved engine loads, an altered one is refused, and other people's files are not touched."""

from __future__ import annotations

import hashlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from llmengine import LLM, ModelConfig
from llmengine.checkpoints.dummy_weights import stream_dummy
from llmengine.checkpoints.engine_dir import model_config_hash, save_engine
from llmengine.checkpoints.model_saving import save_model
from llmengine.checkpoints.opening import open_model
from llmengine.checkpoints.source import ModelSource
from llmengine.dtypes import torch_dtype
from llmengine.errors import ConfigError, CorruptFileError, EngineError, ModelLoadError, UnsupportedModelError
from llmengine.quantization.int8 import INT8
from llmengine.quantization.model_formats import DENSE_MODEL, ModelFormats
from tests import ROOT
from tests.models.arch_helpers import SMALL_ARCH

ARCH = SMALL_ARCH
TOKENIZER = {"tokenizer.json": b'{"a": 1}', "chat_template.jinja": b"{{ x }}!", "additional/tool.jinja": b"tool"}
FILES = ["engine.json", "weights.rank0.safetensors", *(f"tokenizer/{name}" for name in TOKENIZER)]


def save(directory: Path, **changes: Any) -> None:
    values: dict[str, Any] = {
        "arch": ARCH,
        "weights": stream_dummy(ARCH, torch.bfloat16),
        "dtype": "bfloat16",
        "formats": DENSE_MODEL,
        "generation_config": {"temperature": 0.25, "note": "é"},
        "eos_token_ids": (3, 4),
        "bos_token_id": 1,
        "tokenizer_files": TOKENIZER,
    }
    save_engine(directory, **{**values, **changes})


def load(directory: Path, dtype: torch.dtype = torch.bfloat16) -> dict[str, torch.Tensor]:
    return dict(open_model(directory).weights(dtype))


def tree(directory: Path) -> dict[str, bytes]:
    paths = (path for path in directory.rglob("*") if path.is_file())
    return {path.relative_to(directory).as_posix(): path.read_bytes() for path in paths}


def save_again(directory: Path, source: ModelSource, dtype: str, tokenizer: object = None) -> None:
    weights = source.weights(torch.float32)
    save_model(directory, source, weights, dtype=dtype, formats=source.formats, tokenizer=tokenizer)


@pytest.fixture
def engine(tmp_path: Path) -> Path:
    save(tmp_path / "engine")
    return tmp_path / "engine"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_round_trip(engine: Path, dtype: torch.dtype) -> None:
    source = open_model(engine)
    assert (source.kind, source.arch, source.checkpoint_dtype) == ("engine", ARCH, "bfloat16")
    assert (source.eos_token_ids, source.bos_token_id) == ((3, 4), 1)
    assert source.generation_config == {"temperature": 0.25, "note": "é"}
    assert tree(source.tokenizer_path) == TOKENIZER
    loaded = list(source.weights(dtype))
    expected = list(stream_dummy(ARCH, torch.bfloat16))
    assert [name for name, _ in loaded] == [name for name, _ in expected]
    for (name, tensor), (_, saved) in zip(loaded, expected, strict=True):
        assert torch.equal(tensor, saved.to(dtype)), name
    assert sorted(tree(engine)) == sorted(FILES)
    assert [path.name for path in engine.parent.iterdir()] == ["engine"]


def test_the_safetensors_library_reads_the_weights(engine: Path) -> None:
    read = load_file(engine / "weights.rank0.safetensors")
    expected = dict(stream_dummy(ARCH, torch.bfloat16))
    assert read.keys() == expected.keys()
    assert all(torch.equal(read[name], tensor) for name, tensor in expected.items())


def test_int8_weights_keep_their_scales(tmp_path: Path) -> None:
    layout = ModelFormats(INT8).layout(ARCH, "float32")
    weights = {
        name: torch.arange(torch.Size(spec.shape).numel()).reshape(spec.shape).to(torch_dtype(spec.dtype))
        for name, spec in layout.items()
    }
    save(tmp_path / "e", weights=weights.items(), dtype="float32", formats=ModelFormats(INT8))
    source = open_model(tmp_path / "e")
    assert source.formats == ModelFormats(INT8)
    assert json.loads((tmp_path / "e" / "engine.json").read_text())["quantization"] == {"weights": "int8"}
    loaded = dict(source.weights(torch.bfloat16))
    assert loaded["layers.0.qkv.weight"].dtype == torch.int8
    assert loaded["layers.0.qkv.weight_scale"].dtype == torch.float32
    assert loaded["embed_tokens.weight"].dtype == torch.bfloat16
    assert all(torch.equal(loaded[name], tensor.to(loaded[name].dtype)) for name, tensor in weights.items())


def test_save_model_copies_tokenizer_files_and_saves_again(engine: Path, tmp_path: Path) -> None:
    source = open_model(engine)
    save_again(tmp_path / "second", source, "float32")
    assert tree(tmp_path / "second" / "tokenizer") == TOKENIZER
    assert load(tmp_path / "second").keys() == load(engine).keys()

    class Writer:
        def save(self, directory: Path) -> None:
            (directory / "sub").mkdir()
            (directory / "sub" / "t.json").write_bytes(b"{}")

    save_again(engine, source, "bfloat16", Writer())
    assert tree(engine / "tokenizer") == {"sub/t.json": b"{}"}
    load(engine)


def test_weights_of_more_than_16_bits_are_saved_as_they_are(tmp_path: Path) -> None:
    config = {
        **{"architectures": ["LlamaForCausalLM"], "dtype": "bfloat16", "hidden_act": "silu", "rms_norm_eps": 1e-5},
        **{"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": False},
        **{"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "max_position_embeddings": 128},
    }
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    of_files, first, second = tmp_path / "model", tmp_path / "first", tmp_path / "second"
    for directory, load_format, saved in ((of_files, "dummy", first), (first, "auto", second)):
        settings: dict[str, Any] = {"device": "cpu", "load_format": load_format}
        with LLM(ModelConfig(directory, **settings), enable_tokenizer=False) as llm:
            llm.save(saved)
        assert open_model(saved).checkpoint_dtype == "float32"
        arch = open_model(saved).arch
        for name, tensor in stream_dummy(arch, torch.float32):
            assert torch.equal(load(saved, torch.float32)[name], tensor), name
    save(tmp_path / "half")
    with LLM(ModelConfig(tmp_path / "half", device="cpu"), enable_tokenizer=False) as llm:
        llm.save(tmp_path / "half")
    assert open_model(tmp_path / "half").checkpoint_dtype == "bfloat16", "16 bits, though a CPU computes in float32"


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["missing", "truncated", "extended", "empty", "flipped", "swapped"])
def test_damage_to_any_file_is_found(engine: Path, name: str, damage: str) -> None:
    path = engine / name
    whole = path.read_bytes()
    if damage == "missing":
        path.unlink()
    elif damage == "swapped":
        save(engine.parent / "other", tokenizer_files={key: value[::-1] for key, value in TOKENIZER.items()}, arch=ARCH)
        other = engine.parent / "other" / name
        if name == "weights.rank0.safetensors":
            other = engine / "tokenizer/tokenizer.json"
        path.write_bytes(other.read_bytes())
    else:
        middle = len(whole) // 2
        flipped = whole[:middle] + bytes([whole[middle] ^ 4]) + whole[middle + 1 :]
        path.write_bytes({"truncated": whole[:-1], "extended": whole + b" ", "empty": b"", "flipped": flipped}[damage])
    if name == "engine.json" and damage == "missing":
        with pytest.raises(EngineError, match=r"neither engine\.json"):
            load(engine)
        return
    with pytest.raises(CorruptFileError, match=r"engine\.json|expected") as caught:
        load(engine)
    if not (name == "engine.json" and damage == "swapped"):
        assert path.name in str(caught.value)


def test_every_flipped_bit_of_the_manifest_is_found(engine: Path) -> None:
    path = engine / "engine.json"
    whole = path.read_bytes()
    for position in range(0, len(whole), 7):
        damaged = bytearray(whole)
        damaged[position] ^= 1 << (position % 8)
        path.write_bytes(damaged)
        with pytest.raises((CorruptFileError, UnsupportedModelError)):
            load(engine)


def encode(values: dict[str, Any]) -> str:
    return json.dumps(values, indent=2, ensure_ascii=False) + "\n"


ADDED_SINCE_FORMAT_1 = {
    *("local_rope", "layers", "norm_placement", "qk_norm", "attention_scale", "attention_soft_cap"),
    *("embedding_scale", "logit_scale", "logit_soft_cap", "float32_norms"),
    *("short_factor", "long_factor", "rotary_dim"),
}


def test_an_engine_of_format_1_loads(engine: Path) -> None:
    expected = load(engine)
    values = json.loads((engine / "engine.json").read_text())
    arch = {name: value for name, value in values["arch"].items() if name not in ADDED_SINCE_FORMAT_1}
    arch["rope"] = {name: value for name, value in arch["rope"].items() if name not in ADDED_SINCE_FORMAT_1}
    assert (len(arch), len(arch["rope"])) == (16, 12)
    config_hash = model_config_hash(arch, "bfloat16", {})
    edit(engine, format_version=1, arch=arch, model_config_hash=config_hash, plans="absent")
    assert open_model(engine).arch == ARCH
    assert all(torch.equal(tensor, expected[name]) for name, tensor in load(engine).items())
    save(engine)
    assert json.loads((engine / "engine.json").read_text())["format_version"] == 2


def edit(engine: Path, **changes: Any) -> None:
    path = engine / "engine.json"
    values = {**json.loads(path.read_text()), **changes}
    kept = {key: value for key, value in values.items() if value != "absent" and key != "manifest_sha256"}
    seal = hashlib.sha256(encode(kept).encode()).hexdigest()
    path.write_text(encode({**kept, "manifest_sha256": seal}))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"format_version": 3}, UnsupportedModelError, "from a newer llmengine; this one reads 1 to 2: update"),
        ({"format_version": 0}, UnsupportedModelError, "an older llmengine"),
        ({"format_version": "1"}, CorruptFileError, "format_version: expected an integer"),
        ({"backend": "abacus"}, UnsupportedModelError, "'abacus'"),
        ({"parallel": {"tp_size": 2, "pp_size": 1}}, UnsupportedModelError, "tp_size=2"),
        ({"quantization": {"weights": "int3"}}, UnsupportedModelError, "int3"),
        ({"quantization": {"weights": "int8"}}, CorruptFileError, "model_config_hash"),
        ({"dtype": "float16"}, CorruptFileError, "model_config_hash"),
        ({"dtype": "float8"}, CorruptFileError, "dtype: expected one of"),
        ({"files": {}}, CorruptFileError, "weights.rank0"),
        ({"files": {"../x": {"size_bytes": 1, "sha256": ""}}}, CorruptFileError, "not a file of an engine"),
        ({"files": {"plans/../x": {"size_bytes": 1, "sha256": ""}}}, CorruptFileError, "not a file of an engine"),
        ({"files": {"tokenizer/../../x": {"size_bytes": 1, "sha256": ""}}}, CorruptFileError, "not a file of an"),
        ({"eos_token_ids": ["3"]}, CorruptFileError, "eos_token_ids"),
        ({"arch": "absent"}, CorruptFileError, "missing keys: 'arch'"),
        ({"surprise": 1}, CorruptFileError, "unknown keys: 'surprise'"),
    ],
)
def test_manifests_of_other_versions_and_contents(
    engine: Path, changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    edit(engine, **changes)
    with pytest.raises(error, match=message):
        open_model(engine)


def test_what_cannot_be_looked_into_is_a_model_that_cannot_be_read() -> None:
    with pytest.raises(ModelLoadError, match=r"model_dir='x+' cannot be read: File name too long"):
        open_model("x" * 300)


def test_contents_are_checked_before_the_first_tensor(engine: Path) -> None:
    path = engine / "weights.rank0.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    stream = open_model(engine).weights(torch.float32)
    with pytest.raises(CorruptFileError, match=r"weights\.rank0\.safetensors: has sha256"):
        next(stream)


def test_foreign_directories_are_refused_and_kept(engine: Path, tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("years of work")
    (engine / "notes.txt").write_text("keep me")
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "engine.json").write_text("{")
    (tmp_path / "folders" / "photos").mkdir(parents=True)
    save(tmp_path / "linking")
    (tmp_path / "linking" / "home").symlink_to(mine)
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for target, message in [
        (mine, "neither empty nor a saved engine"),
        (mine / "thesis.txt", "is not a directory"),
        (engine, r"notes\.txt"),
        (broken, "cannot be read"),
        (tmp_path / "folders", "neither empty nor a saved engine"),
        (tmp_path / "linking", "files that are not the saved engine's: home"),
        (tmp_path / "loop", "is not a directory"),
    ]:
        before = tree(tmp_path)
        with pytest.raises(ConfigError, match=message):
            save(target)
        assert tree(tmp_path) == before


def test_what_is_put_there_while_saving_is_kept(engine: Path) -> None:
    def slow() -> Iterator[tuple[str, torch.Tensor]]:
        (engine / "notes.txt").write_text("keep me")
        yield from stream_dummy(ARCH, torch.bfloat16)

    with pytest.raises(ConfigError, match=r"notes\.txt"):
        save(engine, weights=slow(), eos_token_ids=(9,))
    assert (engine / "notes.txt").read_text() == "keep me"
    assert open_model(engine).eos_token_ids == (3, 4)
    assert [path.name for path in engine.parent.iterdir()] == ["engine"]


def test_of_two_saves_at_once_the_last_to_end_stays(tmp_path: Path) -> None:
    def slow() -> Iterator[tuple[str, torch.Tensor]]:
        save(tmp_path / "e", eos_token_ids=(9,))
        yield from stream_dummy(ARCH, torch.bfloat16)

    save(tmp_path / "e", weights=slow())
    assert open_model(tmp_path / "e").eos_token_ids == (3, 4)
    load(tmp_path / "e")
    assert [path.name for path in tmp_path.iterdir()] == ["e"]


def test_the_current_directory_is_not_replaced(engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for place in (engine, engine / "tokenizer"):
        monkeypatch.chdir(place)
        with pytest.raises(ConfigError, match="the current directory"):
            save(engine)
        assert Path.cwd() == place
    monkeypatch.chdir(engine.parent)
    save(Path("engine"), eos_token_ids=(9,))
    assert open_model("engine").eos_token_ids == (9,)


def test_what_a_loaded_engine_reads_when_it_is_saved(engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(engine.parent)
    source = open_model("engine")
    monkeypatch.chdir("/")
    save_again(engine.parent / "second", source, "bfloat16")
    assert tree(engine.parent / "second" / "tokenizer") == TOKENIZER
    shutil.rmtree(engine / "tokenizer")
    with pytest.raises(ModelLoadError, match="tokenizer: has gone since the model was loaded"):
        save_again(engine.parent / "third", source, "bfloat16")


def test_empty_directories_and_engines_are_replaced(engine: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    save(tmp_path / "empty")
    load(tmp_path / "empty")
    save(engine, eos_token_ids=(9,))
    assert open_model(engine).eos_token_ids == (9,)
    (tmp_path / "link").symlink_to(engine)
    save(tmp_path / "link", eos_token_ids=(8,))
    assert open_model(engine).eos_token_ids == (8,)
    save(tmp_path / "new" / "nested")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "engine", "link", "new"]


@pytest.mark.parametrize("replaces", [False, True])
def test_a_failed_write_leaves_things_as_they_were(tmp_path: Path, replaces: bool) -> None:
    if replaces:
        save(tmp_path / "e")
    before = tree(tmp_path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(EngineError, match="saving failed, the directory is as it was before: File too large"):
            save(tmp_path / "e")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert tree(tmp_path) == before
    assert [path.name for path in tmp_path.iterdir()] == (["e"] if replaces else [])


def test_a_failing_or_wrong_weight_stream_leaves_nothing(tmp_path: Path) -> None:
    def failing() -> Iterator[tuple[str, torch.Tensor]]:
        yield next(stream_dummy(ARCH, torch.bfloat16))
        raise CorruptFileError("the source broke")

    with pytest.raises(CorruptFileError, match="the source broke"):
        save(tmp_path / "new" / "e", weights=failing())
    for weights in ([], list(stream_dummy(ARCH, torch.float32)), list(stream_dummy(ARCH, torch.bfloat16))[::-1]):
        with pytest.raises(AssertionError):
            save(tmp_path / "e", weights=weights)
    with pytest.raises(ConfigError, match="relative path"):
        save(tmp_path / "e", tokenizer_files={"../x": b""})
    assert list(tmp_path.iterdir()) == []


def test_a_path_where_nothing_can_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(EngineError, match=f"{tmp_path / 'file' / 'e'}: saving failed.*: {tmp_path / 'file'}$"):
        save(tmp_path / "file" / "e")
    with pytest.raises(EngineError, match=r"saving failed.*: File name too long: "):
        save(tmp_path / ("x" * 300))


def save_until(step: int, directory: Path) -> None:
    """Save, and kill this process before or after one of the calls that sync or rename; `step` counts these moments."""
    calls_left = iter(range(step, -1, -1))

    def kill_if_due() -> None:
        if next(calls_left, None) == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def counted(call: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any, **options: Any) -> Any:
            kill_if_due()
            result = call(*arguments, **options)
            kill_if_due()
            return result

        return run

    for owner, name in ((os, "fsync"), (Path, "rename"), (shutil, "rmtree")):
        setattr(owner, name, counted(getattr(owner, name)))
    save(directory, eos_token_ids=(9,))


def killed_saves(directory: Path, replaces: bool) -> None:
    """Kill saves at each step until one is not killed; print the `eos_token_ids` that then load, or None."""
    for step in range(1000):
        if replaces:
            save(directory)
        child = os.fork()
        if child == 0:
            save_until(step, directory)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if directory.exists():
            load(directory)
        print(json.dumps(open_model(directory).eos_token_ids if directory.exists() else None))
        shutil.rmtree(directory, ignore_errors=True)
        if status == 0:
            return


def test_a_killed_save_leaves_no_engine_or_the_old_one(tmp_path: Path) -> None:
    # In a process of its own, because it forks.
    code = f"import sys; sys.path[:0] = {[str(ROOT)]!r}; import tests.checkpoints.test_engine_dir as here"
    run = f"{code}; [here.killed_saves(here.Path({str(tmp_path / 'e')!r}), replaces) for replaces in (False, True)]"
    done = subprocess.run([sys.executable, "-c", run], check=True, capture_output=True)
    outcomes = [json.loads(line) for line in done.stdout.splitlines()]
    begin = outcomes.index([3, 4])
    for part, before in ((outcomes[:begin], None), (outcomes[begin:], [3, 4])):
        switch = part.index([9])
        assert 10 < switch < len(part) - 1
        assert part == [before] * switch + [[9]] * (len(part) - switch)


def test_what_killed_saves_left_is_removed_a_day_later(tmp_path: Path) -> None:
    for name, age_s in [(".e.0a.tmp", 90_000), (".e.0b.tmp", 0), (".f.0a.tmp", 90_000)]:
        (tmp_path / name / "tokenizer").mkdir(parents=True)
        os.utime(tmp_path / name, (time.time() - age_s,) * 2)
    save(tmp_path / "e")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".e.0b.tmp", ".f.0a.tmp", "e"]
