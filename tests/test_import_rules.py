"""The table in docs/architecture.md of which layer may import which, checked against the source."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import ROOT

DATA = {
    *(
        "errors",
        "checks",
        "dtypes",
        "config",
        "quant_config",
        "settings",
        "sampling_params",
        "request_options",
        "structured_output",
        "outputs",
        "observer",
        "batch",
        "rank_hosts",
    ),
    *("dtypes", "generation_config", "tokenizer.end_tokens"),
    *("chat.answers.events", "chat.answers.answer_log"),
}

# Layer -> the layers it may import beside itself. A layer is a folder or a module; the longest name that fits counts.
ALLOWED: dict[str, set[str]] = {
    **dict.fromkeys(DATA, DATA),
    "chat": DATA,
    "tokenizer.stop_strings": set(),
    "tokenizer.bounds": set(),
    "tokenizer.detokenizer": {"tokenizer.protocol", "tokenizer.stop_strings"},
    "tokenizer.protocol": {*DATA, "chat", "tokenizer.bounds", "tokenizer.detokenizer"},
    "tokenizer": {*DATA, "chat", "checkpoints", "tokenizer.bounds", "tokenizer.protocol"},
    "structured": {*DATA, "tokenizer.protocol"},
    "engine": {*DATA, "chat", "structured", "tokenizer.detokenizer", "tokenizer.protocol"},
    "testing": {*DATA, "chat", "tokenizer.protocol"},
    "user_cache": set(),
    "models": DATA,
    "models.doc": {*DATA, "models", "checkpoints", "quantization"},
    "quantization": {*DATA, "models", "terminal_progress"},
    "kernels": {"dtypes", "quantization", "user_cache"},
    "checkpoints": {*DATA, "models", "quantization"},
    "backends": {*DATA, "models"},
    "backends.__init__": {
        *(*DATA, "backends.cpu", "backends.cuda", "backends.shared_cpu", "backends.shared_cuda", "backends.tensorrt"),
        "checkpoints",
    },
    "backends.blocks_in_use": {*DATA, "backends.cpu", "checkpoints", "kernels", "quantization"},
    "backends.rank_places": {*DATA, "checkpoints", "models"},
    "backends.ranks": DATA,
    "backends.shared_cpu": {
        *(*DATA, "backends", "backends.blocks_in_use", "backends.cpu", "backends.ranks", "backends.shared_weights"),
        *("backends.rank_places", "backends.shared_cpu_passes", "checkpoints", "models"),
    },
    "backends.shared_cpu_passes": {*DATA, "backends.cpu", "backends.ranks", "backends.shared_weights", "models"},
    "backends.shared_weights": {*DATA, "backends.ranks", "checkpoints"},
    "backends.shared_cuda": {
        *(*DATA, "backends", "backends.blocks_in_use", "backends.cuda", "backends.ranks", "checkpoints", "kernels"),
        *("backends.rank_places", "backends.shared_weights", "models"),
    },
    "backends.cpu": {*DATA, "backends", "models", "quantization", "checkpoints"},
    "backends.cuda": {*DATA, "backends", "models", "quantization", "checkpoints", "kernels", "user_cache"},
    "backends.tensorrt": {
        *(*DATA, "backends", "backends.cuda", "models", "quantization", "checkpoints", "kernels", "user_cache"),
        *("backends.ranks", "backends.shared_cuda", "backends.shared_weights", "terminal_progress"),
    },
    "saved_engines": {*DATA, "backends", "backends.tensorrt", "checkpoints", "models", "tokenizer"},
    "beam_search": {*DATA, "engine"},
    "llm_parts": {
        *DATA,
        *("backends", "backends.blocks_in_use", "checkpoints", "engine", "quantization", "tokenizer"),
        "tokenizer.protocol",
    },
    "terminal_progress": set(),
    "model_quality": {*DATA, "quantization", "terminal_progress"},
    "generate_all": {*DATA, "engine", "llm_parts", "terminal_progress"},
    "llm_quality": {*DATA, "generate_all", "llm_parts", "model_quality", "quantization"},
    "llm": {
        *(*DATA, "beam_search", "chat", "engine", "generate_all", "llm_parts", "llm_quality", "model_quality"),
        *("quantization", "tokenizer.protocol"),
    },
    "observability": {*DATA, "__init__", "engine", "llm"},
    "server": {*DATA, "__init__", "chat", "engine", "llm", "observability"},
    "load_test": {*DATA, "engine", "llm"},
    "cli": {
        *(
            *DATA,
            "__init__",
            "checkpoints",
            "llm",
            "load_test",
            "observability",
            "quantization",
            "saved_engines",
            "server",
        ),
        "tokenizer.protocol",
    },
    "cluster": {*DATA, "chat", "cluster.ray_hosts", "cluster.router", "engine", "llm"},
    "cluster.ray_hosts": {*DATA, "backends.ranks"},
    "cluster.router": set(),
    "cluster.serve": {*DATA, "cluster", "cluster.ray_hosts", "cluster.router", "llm", "server"},
    "__main__": {"cli"},
    "__init__": {*DATA, "engine", "llm", "beam_search", "quantization"},
}
THIRD_PARTY: dict[str, set[str]] = {
    **{layer: set() for layer in DATA},
    "dtypes": {"torch"},
    "quantization": {"torch", "numpy", "gguf"},
    "user_cache": set(),
    "__init__": set(),
    "engine": {"anyio"},
    "structured": {"llguidance"},
    "testing": set(),
    "tokenizer.bounds": set(),
    "tokenizer.detokenizer": set(),
    "tokenizer.protocol": set(),
    "tokenizer.stop_strings": set(),
    "chat": {"jinja2"},
    "beam_search": set(),
    "llm_parts": set(),
    "terminal_progress": {"rich"},
    "model_quality": set(),
    "generate_all": set(),
    "llm_quality": set(),
    "llm": {"anyio"},
    "observability": {"msgpack", "opentelemetry", "prometheus_client", "zmq"},
    "server": {"fastapi", "opentelemetry", "prometheus_client", "pydantic", "pydantic_core", "starlette", "uvicorn"},
    "load_test": {"anyio", "httptools", "matplotlib"},
    "cluster": {"anyio", "ray"},
    "cluster.ray_hosts": {"ray"},
    "cluster.router": set(),
    "cluster.serve": {"prometheus_client", "ray", "starlette"},
    "kernels": {"cuda", "torch", "triton"},
}


def layer_of(module: str) -> str:
    """The layer of a module, named from inside the package: the longest name in `ALLOWED` that it begins with."""
    parts = module.split(".")
    names = [".".join(parts[:count]) for count in range(len(parts), 0, -1)]
    return next((name for name in names if name in ALLOWED), parts[0])


def sources() -> Iterator[tuple[str, Path]]:
    """Yield (layer, file) for each module of the package."""
    for path in sorted((ROOT / "llmengine").rglob("*.py")):
        module = ".".join(path.relative_to(ROOT / "llmengine").with_suffix("").parts)
        yield layer_of(module), path


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
    """Return the module that `from llmengine import name` imports: one of the package's, or the root for an export."""
    package = ROOT / "llmengine"
    return f"llmengine.{name}" if (package / name).is_dir() or (package / f"{name}.py").exists() else "llmengine"


def first_party(path: Path) -> set[str]:
    """Return the layers that a file imports."""
    names = [name.partition(".") for name in imported(path)]
    return {layer_of(rest or "__init__") for first, _, rest in names if first == "llmengine"}


def folders(path: Path) -> set[str]:
    """Return the top-level folders and modules of the package that a file imports."""
    return {layer.partition(".")[0] for layer in first_party(path)}


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


def test_devices_do_not_know_each_other() -> None:
    devices = {"backends.cpu", "backends.cuda", "backends.tensorrt"}
    known = {layer: ALLOWED[layer] & devices for layer in devices}
    assert known == {"backends.cpu": set(), "backends.cuda": set(), "backends.tensorrt": {"backends.cuda"}}
    assert not ALLOWED["backends"] & devices, "what every backend uses"


def test_only_llm_parts_wires_engine_and_backends() -> None:
    wiring = [path.name for _, path in sources() if {"engine", "backends"} <= folders(path)]
    assert wiring == ["llm_parts.py"]


def test_heavy_libraries_are_below_llm_only() -> None:
    allowed = {"dtypes", "models", "quantization", "checkpoints", "backends", "kernels", "tokenizer", "cli"}
    heavy = {"torch", "transformers", "tensorrt", "triton", "tokenizers", "sentencepiece"}
    for layer, path in sources():
        assert layer in allowed or layer.startswith("backends.") or not third_party(path) & heavy, path


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks").rglob("*.py")), ids=lambda path: path.name)
def test_benchmarks_use_the_public_package(path: Path) -> None:
    # These measure the scheduler itself, the CPU's sampler, the building of plans, and sums over ranks.
    subjects = {"simulate.py": {"engine"}, "sampling.py": {"backends"}, "tensorrt_build.py": {"backends"}}
    subjects |= {"all_reduce.py": {"backends"}, "rank_hosts.py": {"backends"}}
    assert not folders(path) & {"engine", "backends"} - subjects.get(path.name, set())


def test_benchmarks_folder_is_where_this_test_looks() -> None:
    assert (ROOT / "benchmarks").is_dir()


def test_import_scan_sees_every_form(tmp_path: Path) -> None:
    file = tmp_path / "sample.py"
    file.write_text(
        "import llmengine.engine.engine as e, torch\nfrom llmengine import llm, LLM\n"
        "def f():\n    from llmengine.backends.cpu.step_inputs import x\n    import numpy.random\n"
    )
    assert first_party(file) == {"engine", "llm", "backends.cpu", "__init__"}
    assert folders(file) == {"engine", "llm", "backends", "__init__"}
    assert third_party(file) == {"torch", "numpy"}
