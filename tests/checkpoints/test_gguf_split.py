"""GGUF models in several files, as llama-gguf-split writes them, load by the name of any of the files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from llmengine import LLM, ModelConfig, SamplingParams
from llmengine.checkpoints.gguf_file import read_gguf
from llmengine.checkpoints.opening import open_model
from llmengine.errors import CorruptFileError, ModelLoadError
from tests.checkpoints.helpers import assert_streams, canonical, make_model, rounded, write_gguf


@pytest.fixture(scope="module")
def model() -> Any:
    return make_model()


def split(whole: Path, stem: str, num_files: int, **changes: Any) -> list[Path]:
    """Split a file as llama-gguf-split does: all metadata in the first part, tensors in order."""
    reader = gguf.GGUFReader(whole)
    size = -(-len(reader.tensors) // num_files)
    paths = []
    for number in range(num_files):
        path = whole.with_name(f"{stem}-{number + 1:05d}-of-{num_files:05d}.gguf")
        writer = gguf.GGUFWriter(str(path), "llama")
        if number:
            writer.kv_data[0].clear()
        for field in reader.fields.values() if number == 0 else ():
            if not field.name.startswith("GGUF.") and field.name != "general.architecture":
                sub_type = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
                writer.add_key_value(field.name, field.contents(), field.types[0], sub_type=sub_type)
        values = {"no": number, "count": num_files, "tensors": len(reader.tensors)}
        values |= changes.get(f"file{number + 1}", {})
        writer.add_uint16("split.no", values["no"])
        writer.add_uint16("split.count", values["count"])
        writer.add_int32("split.tensors.count", values["tensors"])
        for tensor in reader.tensors[number * size : (number + 1) * size]:
            writer.add_tensor(tensor.name, np.asarray(tensor.data), raw_dtype=tensor.tensor_type)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        paths.append(path)
    whole.unlink()
    return paths


@pytest.mark.parametrize("matrix_type", ["F32", "Q8_0"])
@pytest.mark.parametrize("num_files", [2, 3, 5])
def test_any_file_stands_for_all(model: Any, tmp_path: Path, matrix_type: str, num_files: int) -> None:
    write_gguf(tmp_path / "whole.gguf", model, matrix_type)
    metadata = read_gguf(tmp_path / "whole.gguf").metadata
    paths = split(tmp_path / "whole.gguf", "Tiny-Q8_0", num_files)
    wanted = canonical(rounded(model.state_dict(), matrix_type))
    for place in (*paths, tmp_path):
        assert_streams(place, wanted)
        source = open_model(place)
        assert source.path == source.tokenizer_path == paths[0]
        assert metadata.items() <= source.tokenizer_metadata.items()


def test_tied(tmp_path: Path) -> None:
    model = make_model(tie_word_embeddings=True)
    state = {name: tensor for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    model.state_dict = lambda: state
    write_gguf(tmp_path / "whole.gguf", model, "F32")
    assert_streams(split(tmp_path / "whole.gguf", "tied", 2)[1], canonical(state))


def test_tokens_are_those_of_the_whole_file_also_when_saved(model: Any, tmp_path: Path) -> None:
    write_gguf(tmp_path / "whole.gguf", model, "Q8_0")
    params = SamplingParams(max_new_tokens=6, ignore_eos=True)

    def tokens(place: Path, saved: Path | None = None) -> list[int]:
        with LLM(ModelConfig(place, num_threads=1), enable_tokenizer=False) as llm:
            if saved is not None:
                llm.save(saved)
            return llm.generate([5, 9, 3], params)[0].token_ids

    wanted = tokens(tmp_path / "whole.gguf")
    paths = split(tmp_path / "whole.gguf", "x", 3)
    assert tokens(paths[2], tmp_path / "saved") == wanted == tokens(tmp_path / "saved")


def test_links_to_blobs(model: Any, tmp_path: Path) -> None:
    (tmp_path / "blobs").mkdir()
    (tmp_path / "snapshot").mkdir()
    write_gguf(tmp_path / "blobs" / "whole.gguf", model, "F32")
    for index, path in enumerate(split(tmp_path / "blobs" / "whole.gguf", "x", 2)):
        path.rename(tmp_path / "blobs" / f"{index:x}")
        (tmp_path / "snapshot" / path.name).symlink_to(Path("..") / "blobs" / f"{index:x}")
    for place in (tmp_path / "snapshot", *(tmp_path / "snapshot").iterdir()):
        assert_streams(place, canonical(model.state_dict()))


@pytest.mark.parametrize("missing", [(1,), (2,), (2, 4)])
def test_missing_files_are_named(model: Any, tmp_path: Path, missing: tuple[int, ...]) -> None:
    write_gguf(tmp_path / "whole.gguf", model, "F32")
    paths = split(tmp_path / "whole.gguf", "x", 4)
    for number in missing:
        paths[number - 1].unlink()
    message = ", ".join(paths[number - 1].name for number in missing)
    for place in (tmp_path, paths[2]):
        with pytest.raises(CorruptFileError, match=rf"of 4 of a split model; {len(missing)} .*missing: {message}$"):
            open_model(place)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"file2": {"no": 2}}, r"x-00002-of-00003\.gguf: split\.no=2 contradicts the file name, expected 1"),
        ({"file2": {"no": 7}}, r"x-00002-of-00003\.gguf: split\.no: expected an integer in \[0, 2\]"),
        ({"file2": {"count": 4}}, r"x-00002-of-00003\.gguf: split\.count: expected 3, as in the other files, found 4"),
        ({"file1": {"count": 4}}, r"x-00001-of-00003\.gguf: split\.count=4 contradicts the file name, which says 3"),
        ({"file1": {"tensors": 20}}, r"x-00001-of-00003\.gguf: split\.tensors\.count=20, but the 3 files contain 21"),
    ],
)
def test_contradictions_are_named(model: Any, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    write_gguf(tmp_path / "whole.gguf", model, "F32")
    paths = split(tmp_path / "whole.gguf", "x", 3, **changes)
    with pytest.raises(CorruptFileError, match=message):
        open_model(paths[0])


def test_a_truncated_file_is_named(model: Any, tmp_path: Path) -> None:
    write_gguf(tmp_path / "whole.gguf", model, "F32")
    paths = split(tmp_path / "whole.gguf", "x", 3)
    paths[1].write_bytes(paths[1].read_bytes()[:-200])
    with pytest.raises(CorruptFileError, match=r"x-00002-of-00003\.gguf: .*truncated"):
        open_model(paths[0])


def test_a_tensor_in_two_files(model: Any, tmp_path: Path) -> None:
    write_gguf(tmp_path / "whole.gguf", model, "F32")
    paths = split(tmp_path / "whole.gguf", "x", 2)
    raw = paths[1].read_bytes()
    first, second = read_gguf(paths[0]), read_gguf(paths[1])
    one = next(name for name in first.tensors if len(name) == len("blk.0.attn_q.weight") and "blk.0" in name)
    two = next(name for name in second.tensors if len(name) == len(one))
    paths[1].write_bytes(raw.replace(two.encode(), one.encode()))
    with pytest.raises(CorruptFileError, match=rf"tensor '{one}' is also in x-00001-of-00002\.gguf"):
        open_model(tmp_path)


def test_a_file_that_was_renamed(model: Any, tmp_path: Path) -> None:
    write_gguf(tmp_path / "whole.gguf", model, "F32")
    paths = split(tmp_path / "whole.gguf", "x", 2)
    paths[1].rename(tmp_path / "second.gguf")
    with pytest.raises(ModelLoadError, match=r"file 2 of 2 of a split model.*NAME-00002-of-00002\.gguf"):
        open_model(tmp_path / "second.gguf")


def test_a_directory_with_two_split_models_names_one_file_of_each(model: Any, tmp_path: Path) -> None:
    for stem in ("a", "b"):
        write_gguf(tmp_path / "whole.gguf", model, "F32")
        split(tmp_path / "whole.gguf", stem, 2)
    with pytest.raises(ModelLoadError, match=r"give the path of one: a-00001-of-00002\.gguf, b-00001-of-00002\.gguf$"):
        open_model(tmp_path)


def test_one_file_of_one(model: Any, tmp_path: Path) -> None:
    write_gguf(tmp_path / "whole.gguf", model, "F32")
    (path,) = split(tmp_path / "whole.gguf", "x", 1)
    assert_streams(path, canonical(model.state_dict()))


def test_weights_are_read_from_each_file_once_opened(model: Any, tmp_path: Path) -> None:
    write_gguf(tmp_path / "whole.gguf", model, "F32")
    paths = split(tmp_path / "whole.gguf", "x", 2)
    source = open_model(paths[0])
    paths[1].write_bytes(paths[1].read_bytes()[:-200])
    with pytest.raises(CorruptFileError, match=r"x-00002-of-00002\.gguf: tensor .*truncated"):
        list(source.weights(torch.float32))
