"""Which layer may import which: the table of the architecture, checked on the source."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DATA = {
    *("errors", "checks", "config", "sampling_params", "request_options", "structured_output", "outputs", "batch"),
    *("end_tokens", "generation_config"),
}

# layer -> the layers it may import; a layer is a package or a module directly under llmengine. Each may import itself.
ALLOWED: dict[str, set[str]] = {
    **dict.fromkeys(DATA, DATA),
    "chat_messages": DATA,
    "chat_sandbox": {*DATA, "chat_messages"},
    "chat_template": {*DATA, "chat_messages", "chat_sandbox"},
    "stop_strings": set(),
    "detokenizer": {"tokenizer", "stop_strings"},
    "tokenizer_bounds": set(),
    "tokenizer": {*DATA, "chat_template", "detokenizer", "tokenizer_bounds"},
    "tokenizer_config": DATA,
    "tokenizer_gguf": {*DATA, "sentencepiece_model", "tokenizer_sentencepiece"},
    "tokenizer_json": {*DATA, "tokenizer_config"},
    "sentencepiece_model": DATA,
    "tokenizer_sentencepiece": {*DATA, "tokenizer_config", "sentencepiece_model"},
    "tokenizer_loading": {
        *DATA,
        "tokenizer",
        "tokenizer_bounds",
        "tokenizer_config",
        "tokenizer_gguf",
        "tokenizer_json",
        "sentencepiece_model",
        "tokenizer_sentencepiece",
        "chat_template",
        "models",
    },
    "grammar": {*DATA, "tokenizer", "unique_keys"},
    "unique_keys": set(),
    "engine": {*DATA, "tokenizer", "detokenizer", "chat_messages", "grammar"},
    "testing": {*DATA, "tokenizer", "chat_template"},
    "user_cache": set(),
    "kernels": {"user_cache"},
    "models": DATA,
    "backends": {*DATA, "models", "kernels", "user_cache"},
    "saved_engines": {*DATA, "backends", "models", "tokenizer_loading"},
    "beam_search": {*DATA, "engine"},
    "llm": {*DATA, "tokenizer", "chat_messages", "tokenizer_loading", "engine", "backends", "models", "beam_search"},
    "demo": {*DATA, "__init__", "llm", "tokenizer"},
    "cli": {*DATA, "__init__", "llm", "demo", "cli_engines"},
    "cli_engines": {*DATA, "__init__", "models", "saved_engines"},
    "__main__": {"cli"},
    "__init__": {*DATA, "engine", "llm", "beam_search"},
}
THIRD_PARTY: dict[str, set[str]] = {
    **{layer: set() for layer in DATA},
    "user_cache": set(),
    "__init__": set(),
    "engine": {"anyio"},
    "grammar": {"llguidance"},
    "testing": set(),
    "tokenizer": set(),
    "tokenizer_bounds": set(),
    "beam_search": set(),
    "llm": {"anyio", "rich"},
    "kernels": {"torch", "triton"},
}


def sources() -> Iterator[tuple[str, Path]]:
    """Yield (layer, file) for each module of the package."""
    for path in sorted((ROOT / "llmengine").rglob("*.py")):
        first = path.relative_to(ROOT / "llmengine").parts[0]
        yield first.removesuffix(".py"), path


def imported(path: Path) -> Iterator[str]:
    """Yield the dotted name of everything a file imports, wherever in the file; relative imports are refused."""
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}:{node.lineno}: relative import"
            assert node.module is not None
            if node.module == "llmengine":
                yield from (_from_root(alias.name) for alias in node.names)
            else:
                yield node.module


def _from_root(name: str) -> str:
    """Return the module that `from llmengine import name` imports: a layer, or the root for an exported name."""
    package = ROOT / "llmengine"
    return f"llmengine.{name}" if (package / name).is_dir() or (package / f"{name}.py").exists() else "llmengine"


def first_party(path: Path) -> set[str]:
    """Return the layers that a file imports."""
    parts = [name.split(".") for name in imported(path)]
    return {names[1] if len(names) > 1 else "__init__" for names in parts if names[0] == "llmengine"}


def third_party(path: Path) -> set[str]:
    """Return the distributions outside the standard library that a file imports."""
    tops = {name.split(".")[0] for name in imported(path)}
    return tops - set(sys.stdlib_module_names) - {"llmengine", "__future__"}


@pytest.mark.parametrize(("layer", "path"), list(sources()), ids=lambda item: str(item).rpartition("llmengine/")[2])
def test_layer_imports_only_what_is_below_it(layer: str, path: Path) -> None:
    assert layer in ALLOWED, f"{path.name}: a new layer needs its line in ALLOWED"
    assert first_party(path) <= ALLOWED[layer] | {layer}
    if layer in THIRD_PARTY:
        assert third_party(path) <= THIRD_PARTY[layer]


def test_only_llm_wires_engine_and_backends() -> None:
    wiring = [path.name for _, path in sources() if {"engine", "backends"} <= first_party(path)]
    assert wiring == ["llm.py"]


def test_heavy_libraries_are_below_llm_only() -> None:
    tokenizers = {f"tokenizer_{part}" for part in ("config", "gguf", "json", "loading", "sentencepiece")}
    allowed = {"models", "backends", "kernels", *tokenizers, "demo", "cli"}
    heavy = {"torch", "transformers", "tensorrt", "triton", "tokenizers", "sentencepiece"}
    for layer, path in sources():
        assert layer in allowed or not third_party(path) & heavy, path


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks").rglob("*.py")), ids=lambda path: path.name)
def test_benchmarks_use_the_public_package(path: Path) -> None:
    # What these measure is the scheduler itself, the CPU's sampler, and the building of plans.
    subjects = {"simulate.py": {"engine"}, "sampling.py": {"backends"}, "tensorrt_build.py": {"backends"}}
    assert not first_party(path) & {"engine", "backends"} - subjects.get(path.name, set())


def test_benchmarks_folder_is_where_this_test_looks() -> None:
    assert (ROOT / "benchmarks").is_dir()


def test_import_scan_sees_every_form(tmp_path: Path) -> None:
    file = tmp_path / "sample.py"
    file.write_text(
        "import llmengine.engine.engine as e, torch\nfrom llmengine import llm, LLM\n"
        "def f():\n    from llmengine.backends.inputs import x\n    import numpy.random\n"
    )
    assert first_party(file) == {"engine", "llm", "backends", "__init__"}
    assert third_party(file) == {"torch", "numpy"}
