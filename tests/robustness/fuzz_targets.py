"""The files that `fuzz.py` damages: small sound ones of each kind and family, and the reader of each."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import gguf
import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from llmengine import saved_engines
from llmengine.backends.tensorrt.builder import BuiltPlan, PlanJob
from llmengine.backends.tensorrt.cache import PlanCache
from llmengine.backends.tensorrt.obtain import PlanRequest, obtain_plans
from llmengine.backends.tensorrt.plan_set import Producer
from llmengine.backends.tensorrt.spec import BuildTarget, WeightMode
from llmengine.backends.tensorrt.verify import SegmentCheck, Verification
from llmengine.chat.template import ChatTemplate
from llmengine.checkpoints import engine_dir, gguf_checkpoint, huggingface_checkpoint
from llmengine.checkpoints.canonical_weights import stored_shapes
from llmengine.checkpoints.dequantized_source import without_blocks
from llmengine.checkpoints.dummy_weights import stream_dummy
from llmengine.checkpoints.huggingface_arch import arch_from_hf_config
from llmengine.checkpoints.model_saving import save_model
from llmengine.checkpoints.opening import open_model
from llmengine.checkpoints.safetensors_file import write_tensors
from llmengine.checkpoints.source import ModelSource
from llmengine.cli import main as cli
from llmengine.dtypes import dtype_name
from llmengine.errors import CorruptFileError
from llmengine.models.arch import ModelArch
from llmengine.models.families import FAMILIES
from llmengine.models.rope import layer_tables
from llmengine.quantization.formats import TensorSpec
from llmengine.quantization.model_formats import DENSE_MODEL
from llmengine.tokenizer.loading import load_tokenizer, tokenizer_from_gguf
from tests.checkpoints import quantized_files
from tests.checkpoints.quantized_files import QuantizedFiles
from tests.robustness.fuzz import TARGETS, Target, mutate_bytes, mutate_json, mutate_text

_TINY = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "hidden_activation": "gelu_pytorch_tanh",
    "sliding_window": 16,
    "bos_token_id": 1,
    "eos_token_id": [2, 3],
    "torch_dtype": "float32",
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": False,
}
_ROPES: tuple[dict[str, Any], ...] = (
    {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    {"rope_type": "yarn", "factor": 4.0, "beta_fast": 32, "beta_slow": 1, "mscale": 0.7, "mscale_all_dim": 0.8},
    {"rope_type": "longrope", "short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [1.0, 2.0, 3.0, 4.0]},
    {"type": "dynamic", "factor": 2.0},
    {"type": "linear", "factor": 2.0},
)


def family_configs() -> list[dict[str, Any]]:
    """Return a config.json for each family, then one of Llama's for each rotary encoding."""
    configs = [
        {**_TINY, **family.config_defaults, "architectures": [family.architecture], "model_type": family.model_type}
        | {"head_dim": 8, "num_key_value_heads": 2, "sliding_window": 16, "max_position_embeddings": 64}
        for family in FAMILIES
    ]
    for index, rope in enumerate(_ROPES):
        key = ("rope_scaling", "rope_parameters")[index % 2]
        configs.append({**configs[0], key: {"original_max_position_embeddings": 32, **rope}})
    return configs


CONFIGS = family_configs()
_TYPES = ["full_attention", "sliding_attention"]
CONFIGS += [{**config, "layer_types": _TYPES, "use_sliding_window": True} for config in CONFIGS[2 : len(FAMILIES)]]


def _arch(config: Mapping[str, Any]) -> ModelArch:
    return arch_from_hf_config(config, "config.json")


def _write_json(path: Path, value: object) -> bytes:
    path.write_text(json.dumps(value))
    return path.read_bytes()


def _write_safetensors(path: Path, shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype = torch.float32) -> bytes:
    with path.open("wb") as file:
        tensors = ((name, torch.full(shape, 0.5, dtype=dtype)) for name, shape in shapes.items())
        write_tensors(file, {name: TensorSpec(dtype_name(dtype), shape) for name, shape in shapes.items()}, tensors)
    return path.read_bytes()


def _hf_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    arch = _arch(config)
    return stored_shapes(arch, huggingface_checkpoint.stored_names(arch))


def read_model(path: Path, tokenizer: bool = False) -> None:
    """Open a model and read all its weights, but none of the many that only an altered config asks for."""
    source = open_model(path)
    layer_tables(source.arch, 16)
    for item in {id(item): item for item in (source, without_blocks(source))}.values():
        for _ in item.weights(torch.float32):
            pass
    if tokenizer:
        tokenizer_from_gguf(source.tokenizer_metadata, str(path)).encode("hello <s>")


def _written(path: Path, read: Callable[[], object]) -> Callable[[int, bytes], None]:
    """Return a function that writes an input to `path` and reads it there."""

    def run(number: int, data: bytes) -> None:
        path.write_bytes(data)
        read()

    return run


def _safetensors(place: Path) -> Target:
    directories, seeds = [], []
    for index, config in enumerate((CONFIGS[0], CONFIGS[4], CONFIGS[7])):
        directory = place / str(index)
        directory.mkdir()
        _write_json(directory / "config.json", config)
        dtype = (torch.float32, torch.bfloat16, torch.float16)[index]
        seeds.append(_write_safetensors(directory / "model.safetensors", _hf_shapes(config), dtype))
        directories.append(directory)

    def read(number: int, data: bytes) -> None:
        (directories[number] / "model.safetensors").write_bytes(data)
        read_model(directories[number])

    return Target("safetensors", seeds, mutate_bytes, read, str(place))


_GROUP = {"targets": ["Linear"], "weights": {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 16}}
_INT8_GROUP = {
    "targets": ["re:.*mlp.*", "lm_head"],
    "weights": {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": True},
    "input_activations": {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True},
    "format": "int-quantized",
}
_QUANTIZED: tuple[QuantizedFiles, ...] = (
    QuantizedFiles(
        {
            "quant_method": "gptq",
            "bits": 4,
            "group_size": 16,
            "desc_act": True,
            "sym": False,
            "dynamic": {"-:.*v_": {}},
        },
        quantized_files.gptq(4, 16, act_order="shared"),
        {"v_proj": None},
    ),
    QuantizedFiles({"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm"}, quantized_files.awq()),
    QuantizedFiles(
        {
            **{"quant_method": "compressed-tensors", "format": "pack-quantized", "ignore": ["re:.*lm_head"]},
            **{"config_groups": {"group_0": _GROUP, "group_1": _INT8_GROUP}, "quantization_status": "compressed"},
        },
        quantized_files.compressed(4, 16),
        {"mlp": quantized_files.int8()},
    ),
    QuantizedFiles(
        {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic", "fmt": "e4m3"},
        quantized_files.fp8("block", name="weight_scale_inv"),
    ),
    QuantizedFiles({"quant_method": "mxfp4"}, quantized_files.mxfp4()),
)


def _quantized_directories(place: Path) -> list[Path]:
    directories = []
    for index, files in enumerate(_QUANTIZED):
        directory, rng = place / str(index), np.random.default_rng(index)
        directory.mkdir()
        tensors: dict[str, torch.Tensor] = {}
        for name, shape in _hf_shapes(CONFIGS[0]).items():
            module = name.removesuffix(".weight")
            packer = files.packer(module) if "_proj" in module else None
            if packer is None:
                tensors[name] = torch.full(shape, 0.5)
            else:
                tensors |= {f"{module}.{suffix}": item for suffix, item in packer(rng, *shape)[0].items()}
        _write_json(directory / "config.json", {**CONFIGS[0], "quantization_config": files.config})
        save_file({name: item.contiguous() for name, item in tensors.items()}, directory / "model.safetensors")
        directories.append(directory)
    return directories


def _in_each(directories: Sequence[Path], name: str) -> tuple[list[bytes], Callable[[int, bytes], None]]:
    """The file `name` of each directory, and a function that reads the model with an input in its place."""

    def read(number: int, data: bytes) -> None:
        (directories[number] / name).write_bytes(data)
        read_model(directories[number])

    return [(directory / name).read_bytes() for directory in directories], read


def _quantized(place: Path) -> Target:
    seeds, read = _in_each(_quantized_directories(place), "model.safetensors")
    return Target("quantized", seeds, mutate_bytes, read, str(place))


def _quantization_config(place: Path) -> Target:
    seeds, read = _in_each(_quantized_directories(place), "config.json")

    def mutate(rng: Any, seed: bytes, others: Sequence[bytes]) -> bytes:
        content = json.loads(seed)
        parts = [json.dumps(json.loads(other)["quantization_config"]).encode() for other in (seed, *others)]
        damaged = mutate_json(rng, parts[0], parts)
        try:
            return json.dumps({**content, "quantization_config": json.loads(damaged)}).encode()
        except (ValueError, RecursionError):
            return damaged

    return Target("quantization_config", seeds, mutate, read, str(place))


def _make_shards(place: Path) -> tuple[list[bytes], bytes]:
    """Write a model of two shards; return them and the index."""
    _write_json(place / "config.json", CONFIGS[0])
    shapes = list(_hf_shapes(CONFIGS[0]).items())
    files = {"model-1.safetensors": shapes[:9], "model-2.safetensors": shapes[9:]}
    shards = [_write_safetensors(place / name, dict(part)) for name, part in files.items()]
    weight_map = {name: file for file, part in files.items() for name, _ in part}
    return shards, _write_json(place / "model.safetensors.index.json", {"metadata": {}, "weight_map": weight_map})


def _shards(place: Path) -> Target:
    seeds, _ = _make_shards(place)

    def read(number: int, data: bytes) -> None:
        path = place / f"model-{number + 1}.safetensors"
        path.write_bytes(data)
        try:
            read_model(place)
        finally:
            path.write_bytes(seeds[number])

    def mutate(rng: Any, seed: bytes, others: Sequence[bytes]) -> bytes:
        """Change the header as JSON, so that it stays sound JSON."""
        (size,) = struct.unpack("<Q", seed[:8])
        header = mutate_json(rng, seed[8 : 8 + size], [seed[8 : 8 + size]])
        return struct.pack("<Q", len(header)) + header + seed[8 + size :]

    return Target("shards", seeds, mutate, read, str(place))


def _index(place: Path) -> Target:
    _, index = _make_shards(place)
    read = _written(place / "model.safetensors.index.json", lambda: read_model(place))
    return Target("index", [index], mutate_json, read, str(place))


def _bin(place: Path) -> Target:
    _write_json(place / "config.json", CONFIGS[0])
    path = place / "pytorch_model.bin"
    torch.save({name: torch.full(shape, 0.5) for name, shape in _hf_shapes(CONFIGS[0]).items()}, path)
    return Target("bin", [path.read_bytes()], mutate_bytes, _written(path, lambda: read_model(place)), str(place))


def _gguf_seeds(place: Path) -> list[bytes]:
    """Return a GGUF file of each family, with a tokenizer."""
    seeds = []
    for index, (family, config) in enumerate(zip(FAMILIES, CONFIGS, strict=False)):
        arch = _arch(config)
        path = place / "seed.gguf"
        writer = gguf.GGUFWriter(str(path), family.gguf_architecture)
        for add, value in (
            (writer.add_block_count, arch.num_layers),
            (writer.add_context_length, 64),
            (writer.add_embedding_length, arch.hidden_size),
            (writer.add_feed_forward_length, arch.intermediate_size),
            (writer.add_head_count, arch.num_heads),
            (writer.add_head_count_kv, arch.num_kv_heads),
            (writer.add_key_length, arch.head_dim),
            (writer.add_value_length, arch.head_dim),
            (writer.add_layer_norm_rms_eps, 1e-5),
            (writer.add_rope_dimension_count, arch.head_dim),
        ):
            add(value)
        if family.gguf_architecture in ("phi3", "gemma2", "gemma3"):
            writer.add_sliding_window(16)
        _add_gguf_tokenizer(writer, "gpt2" if index % 2 else "llama")
        for name, shape in stored_shapes(arch, gguf_checkpoint.stored_names(arch)).items():
            data = np.full(shape, 0.5, dtype=np.float32)
            if len(shape) == 2 and index % 3:
                kind = gguf.GGMLQuantizationType.Q8_0 if index % 3 == 1 else gguf.GGMLQuantizationType.Q5_0
                writer.add_tensor(name, gguf.quants.quantize(data, kind), raw_dtype=kind)
            else:
                writer.add_tensor(name, data)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        seeds.append(path.read_bytes())
    return seeds


def _add_gguf_tokenizer(writer: gguf.GGUFWriter, model: str) -> None:
    tokens = ["<unk>", "<s>", "</s>", "h", "e", "l", "o", "he", "ll", "hell", "hello", *map(chr, range(65, 94))]
    writer.add_tokenizer_model(model)
    writer.add_tokenizer_pre("llama-bpe")
    writer.add_token_list(tokens)
    writer.add_token_types([2, 3, 3] + [1] * (len(tokens) - 3))
    if model == "gpt2":
        writer.add_token_merges(["h e", "l l", "he ll", "hell o"])
    else:
        writer.add_token_scores([-float(index) for index in range(len(tokens))])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_add_bos_token(True)
    writer.add_chat_template("{% for m in messages %}{{ m.content }}{% endfor %}")


def _gguf(place: Path) -> Target:
    path = place / "model.gguf"
    seeds = _gguf_seeds(place)
    return Target("gguf", seeds, mutate_bytes, _written(path, lambda: read_model(path, tokenizer=True)), str(path))


_GGUF_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}


def _gguf_metadata(place: Path) -> Target:
    """GGUF files that are sound but for one changed value or type of the metadata, or one changed tensor entry."""
    path = place / "model.gguf"
    seeds = _gguf_seeds(place)

    def mutate(rng: Any, seed: bytes, others: Sequence[bytes]) -> bytes:
        data = bytearray(seed)
        for _ in range(rng.choice((1, 1, 2, 4))):
            at, kind = rng.choice(_scalars_of(seed))
            value = rng.choice((0, 1, 2, 3, 5, 7, 33, 255, 2**16, 2**31 - 1, 2**32 - 1, 2**63, rng.randrange(2**64)))
            numbers = (0.0, -1.0, 1e-40, 3e38, float("nan"), float("inf"), rng.random() * 4)
            packed = struct.pack("<f", rng.choice(numbers)) if kind == 6 else value.to_bytes(9, "little")
            data[at : at + _GGUF_SIZES[kind]] = packed[: _GGUF_SIZES[kind]]
        return bytes(data)

    return Target("gguf_metadata", seeds, mutate, _written(path, lambda: read_model(path, tokenizer=True)), str(path))


def _scalars_of(data: bytes) -> list[tuple[int, int]]:
    """Return position and type of each number in a sound file's metadata (arrays: some), and of tensors' sizes."""
    found: list[tuple[int, int]] = []
    at = 24

    def skip_string() -> None:
        nonlocal at
        at += 8 + struct.unpack_from("<Q", data, at)[0]

    num_tensors, num_pairs = struct.unpack_from("<QQ", data, 8)
    for _ in range(num_pairs):
        skip_string()
        (kind,) = struct.unpack_from("<I", data, at)
        at += 4
        if kind == 8:
            skip_string()
        elif kind == 9:
            item, length = struct.unpack_from("<IQ", data, at)
            at += 12
            for _ in range(length):
                if item == 8:
                    skip_string()
                else:
                    found.append((at, item))
                    at += _GGUF_SIZES[item]
        else:
            found += [(at, kind)] * 5
            at += _GGUF_SIZES[kind]
    for _ in range(num_tensors):
        skip_string()
        (num_dims,) = struct.unpack_from("<I", data, at)
        found += [(at + 4 + 8 * dim, 10) for dim in range(num_dims)]
        found += [(at + 4 + 8 * num_dims, 4), (at + 8 + 8 * num_dims, 10)]
        at += 16 + 8 * num_dims
    return found


def _config(place: Path) -> Target:
    def read() -> None:
        source = open_model(place, "dummy")
        layer_tables(source.arch, 16)
        gguf_checkpoint.stored_names(source.arch)

    seeds = [json.dumps(config).encode() for config in CONFIGS]
    return Target("config", seeds, mutate_json, _written(place / "config.json", read), str(place))


def _generation_config(place: Path) -> Target:
    _write_json(place / "config.json", CONFIGS[0])
    seeds = [b'{"eos_token_id": [1, 2], "bos_token_id": 1, "temperature": 0.5, "do_sample": true}']
    read = _written(place / "generation_config.json", lambda: open_model(place, "dummy"))
    return Target("generation_config", seeds, mutate_json, read, str(place))


def _save_engines(place: Path) -> list[Path]:
    directories = []
    for index in (0, 8):
        directory = place / str(index)
        arch = _arch(CONFIGS[index])
        engine_dir.save_engine(
            directory,
            arch=arch,
            weights=stream_dummy(arch, torch.float32),
            dtype="float32",
            formats=DENSE_MODEL,
            generation_config={"temperature": 0.5},
            eos_token_ids=[2],
            bos_token_id=1,
            tokenizer_files={"tokenizer.json": b"{}", "chat_template.jinja": b"x"},
        )
        directories.append(directory)
    return directories


def _engine(place: Path) -> Target:
    directories = _save_engines(place)
    seeds = [(directory / "engine.json").read_bytes() for directory in directories]

    def read(number: int, data: bytes) -> None:
        (directories[number] / "engine.json").write_bytes(data)
        read_model(directories[number])
        if data != seeds[number]:
            raise AssertionError("an altered manifest was read")

    return Target("engine", seeds, mutate_bytes, read, str(place))


def _sealed_engine(place: Path) -> Target:
    """Manifests with wrong contents under their right hashes."""
    directories = _save_engines(place)
    seeds = [(directory / "engine.json").read_bytes() for directory in directories]

    def mutate(rng: Any, seed: bytes, others: Sequence[bytes]) -> bytes:
        damaged = mutate_json(rng, seed, others)
        try:
            content = json.loads(damaged)
            if rng.random() < 0.9:
                key = content["arch"], content["dtype"], content["quantization"]
                content["model_config_hash"] = engine_dir.model_config_hash(*key)
            return sealed(content)
        except (ValueError, TypeError, KeyError, AttributeError):
            return damaged

    def read(number: int, data: bytes) -> None:
        (directories[number] / "engine.json").write_bytes(data)
        read_model(directories[number])

    return Target("sealed_engine", seeds, mutate, read, str(place))


def sealed(content: dict[str, Any]) -> bytes:
    """Return a manifest of these values, with the hash that belongs to them."""
    return engine_dir._sealed({key: value for key, value in content.items() if key != "manifest_sha256"})


_PLAN_ARCH = _arch(CONFIGS[0])
_PLAN_REQUEST = PlanRequest(_PLAN_ARCH, "float32", 4, 16, Producer("tensorrt_rtx", "1.7", BuildTarget((89,))))


def _build_plans(jobs: Iterable[PlanJob], num_processes: int) -> Iterator[BuiltPlan]:
    """Stand for the library: a plan names its network, and is the same in each run."""
    for job in jobs:
        job.output.write_bytes(json.dumps({"fingerprint": job.spec.fingerprint()}).encode())
        yield BuiltPlan(job.name, job.output, 0.25, job.output.stat().st_size, 1 << 20, "fake 1")


def _save_plans(place: Path, mode: WeightMode) -> tuple[Path, PlanCache]:
    """Return an engine with plans, and a cache that has the same plans."""
    cache = PlanCache(place / f"{mode}-cache")
    source = ModelSource(
        kind="dummy",
        path=place,
        arch=_PLAN_ARCH,
        checkpoint_dtype="float32",
        generation_config={},
        eos_token_ids=(2,),
        bos_token_id=1,
        tokenizer_path=place,
        stream=lambda dtype: stream_dummy(_PLAN_ARCH, dtype),
    )
    request = dataclasses.replace(_PLAN_REQUEST, weight_mode=mode)
    check = SegmentCheck("mid", "qkv", 4, 1, 0.5, 1.0, 0.5, 1.0, 0.5, 1.0, finite=True)
    verified = Verification("tensorrt_rtx 1.7", "NVIDIA L4", "2026-11-22", (check,), {1: (10.0, 12.0)})
    plans = obtain_plans(request, source, 1, cache=cache, build=_build_plans)
    plans = plans.replace(verification=verified.to_dict(), library_cache=b'{"kernels": [1, 2]}')
    cache.store_findings(plans)
    save_model(
        place / mode,
        source,
        source.weights(torch.float32),
        dtype="float32",
        formats=DENSE_MODEL,
        tokenizer=None,
        plans=plans.to_saved(),
    )
    _use_plans(place / mode, cache)  # so that its imports are measured here, and not with the first input
    return place / mode, cache


def _use_plans(directory: Path, cache: PlanCache) -> None:
    """Show and check an engine and take its plans, which are those of its networks or were built again."""
    terminal = io.TextIOWrapper(io.BytesIO(), "utf-8")
    with contextlib.redirect_stdout(terminal), contextlib.redirect_stderr(terminal):
        cli.main(["inspect", str(directory)])
    source = open_model(directory)
    plans = obtain_plans(_PLAN_REQUEST, source, 1, cache=cache, build=_build_plans)
    for segment in plans.segments:
        assert json.loads(plans.plans[segment.plan_name].read())["fingerprint"] == segment.spec.fingerprint()
        assert all(profile.tokens.max <= 4096 for profile in segment.spec.profiles), "an absurd size is built for"
    problems = [problem for problem in saved_engines.verify(directory).files.values() if problem]
    if problems:
        raise CorruptFileError(problems[0])


def _sealed_plans(place: Path) -> Target:
    """Manifests with wrong plans or a wrong list of files, under their right hash."""
    saved = [_save_plans(place, mode) for mode in get_args(WeightMode)]
    seeds = [(directory / "engine.json").read_bytes() for directory, _ in saved]

    def mutate(rng: Any, seed: bytes, others: Sequence[bytes]) -> bytes:
        content = json.loads(seed)
        part = rng.choice(("plans", "plans", "plans", "files"))
        damaged = mutate_json(rng, json.dumps(content[part]).encode(), [json.dumps(content[part]).encode()])
        try:
            return sealed({**content, part: json.loads(damaged)})
        except (ValueError, RecursionError):
            return seed.replace(b'"plans"', damaged[:1] + b'"plans"')

    def read(number: int, data: bytes) -> None:
        directory, cache = saved[number]
        (directory / "engine.json").write_bytes(data)
        saved_engines.inspect(directory)
        _use_plans(directory, cache)

    return Target("sealed_plans", seeds, mutate, read, str(place))


def _plan_files(place: Path) -> Target:
    """Files beside a sound manifest, and files of the cache: plans that are not whole are built again."""
    saved = [_save_plans(place, mode) for mode in get_args(WeightMode)]
    files = [
        (path, *one)
        for one in saved
        for path in sorted((*(one[0] / "plans").iterdir(), *(place / f"{one[0].name}-cache").iterdir()))
    ]
    seeds = [path.read_bytes() for path, _, _ in files]

    def read(number: int, data: bytes) -> None:
        path, directory, cache = files[number]
        in_cache = path.parent != directory / "plans"
        path.write_bytes(data)
        lost = directory / "plans" / "first.plan"
        kept = lost.read_bytes()
        try:
            if in_cache:
                lost.unlink()
            _use_plans(directory, cache)
        except CorruptFileError:
            if not in_cache:
                raise
        finally:
            lost.write_bytes(kept if path != lost else seeds[number])
            path.write_bytes(seeds[number])

    return Target("plan_files", seeds, mutate_json, read, str(place))


_TOKENIZER_CONFIG = {
    "bos_token": "<s>",
    "eos_token": {"content": "</s>", "special": True},
    "added_tokens_decoder": {"42": {"content": "<tool>", "special": False, "lstrip": False, "normalized": False}},
    "chat_template": [{"name": "default", "template": "{{ messages }}"}, {"name": "tool_use", "template": "x"}],
    "tokenizer_class": "PreTrainedTokenizerFast",
}


def _tokenizer_json() -> bytes:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("h", "e"), ("l", "l"), ("he", "ll"), ("hell", "o")]
    tokens = [*alphabet, *(left + right for left, right in merges)]
    backend = Tokenizer(models.BPE({token: index for index, token in enumerate(tokens)}, merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in ("<s>", "</s>")])
    values = json.loads(backend.to_str())
    values["model"]["vocab"] = dict(list(values["model"]["vocab"].items())[:40])
    kept = set(values["model"]["vocab"])
    values["model"]["merges"] = [pair for pair in values["model"]["merges"] if {*pair, "".join(pair)} <= kept]
    return json.dumps(values).encode()


def _use_tokenizer(directory: Path) -> None:
    tokenizer = load_tokenizer(directory, "huggingface")
    tokenizer.decode(tokenizer.encode("hello <s> A1 é"))
    if tokenizer.has_chat_template:
        try:
            tokenizer.apply_chat_template([{"role": "user", "content": "hello"}])
        except ValueError as error:
            raise CorruptFileError(f"{directory}: {error}") from error


def _tokenizer(place: Path) -> Target:
    _write_json(place / "tokenizer_config.json", _TOKENIZER_CONFIG)
    read = _written(place / "tokenizer.json", lambda: _use_tokenizer(place))
    return Target("tokenizer", [_tokenizer_json(), _template_tokenizer_json()], mutate_json, read, str(place))


def _template_tokenizer_json() -> bytes:
    """Return a tokenizer.json with a normalizer, several splits and a post-processor."""
    values = json.loads(_tokenizer_json())
    values["normalizer"] = {"type": "Sequence", "normalizers": [{"type": "NFC"}, {"type": "Prepend", "prepend": "_"}]}
    values["pre_tokenizer"] = {
        "type": "Sequence",
        "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": "\\p{N}{1,3}| ?\\p{L}+"}, "behavior": "Isolated", "invert": False},
            {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
        ],
    }
    values["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [260], "tokens": ["<s>"]}},
    }
    values["truncation"] = {"direction": "Right", "max_length": 8, "strategy": "LongestFirst", "stride": 0}
    values["padding"] = {
        **{"strategy": {"Fixed": 8}, "direction": "Right", "pad_to_multiple_of": None},
        **{"pad_id": 0, "pad_type_id": 0, "pad_token": "<s>"},
    }
    return json.dumps(values).encode()


def _tokenizer_config(place: Path) -> Target:
    (place / "tokenizer.json").write_bytes(_tokenizer_json())
    read = _written(place / "tokenizer_config.json", lambda: _use_tokenizer(place))
    return Target("tokenizer_config", [json.dumps(_TOKENIZER_CONFIG).encode()], mutate_json, read, str(place))


_MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": [{"type": "text", "text": "hello"}]},
    {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": {"x": 1}}}]},
]
_TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}]
_TEMPLATES = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}{% if message.content is string %}"
    "{{ message['content'] | trim }}{% else %}{% for item in message.content or [] %}{{ item['text'] }}{% endfor %}"
    "{% endif %}{% for call in message.tool_calls or [] %}{{ call.function.arguments }}{% endfor %}"
    "{{ '<|im_end|>' ~ '\n' }}{% endfor %}{% if add_generation_prompt %}{{ 'assistant' }}{% endif %}",
    "{%- macro render(value, depth) -%}{%- if value is mapping -%}{%- for key, item in value.items() -%}"
    "{{- key.rjust(20) }}: {{ render(item, depth + 1) * 2 -}}{%- endfor -%}{%- elif value is iterable -%}"
    "{{ value | join(', ') | indent(4) }}{%- else -%}{{ value | tojson(indent=4) }}{%- endif -%}{%- endmacro -%}"
    "{% set ns = namespace(text='', count=0) %}{% for tool in tools %}{% set ns.text = ns.text ~ render(tool, 0) %}"
    "{% set ns.count = ns.count + 1 %}{% endfor %}{{ ns.text | replace('e', 'ee') }} {{ '%5d' % ns.count }}",
    "{% for i in range(messages | length) recursive %}{% if i > 9 %}{% break %}{% endif %}{{ loop.index0 ** 2 }}"
    "{{ messages | selectattr('tool_calls') | list | length }}"
    "{{ loop([]) if loop.depth < 3 }}{% endfor %}{{ raise_exception('no tools') if not tools }}{% set parts = [] %}"
    "{{ (messages[-1].content or 'x').split('x')[::-1] | list }}{{ '{:>10}'.format('a' * 3) }}{% filter upper %}"
    "{{ strftime_now('%Y') }}{% endfilter %}{% set s %}{{ bos_token }}{% endset %}{{ s * 3 }}{% for m in messages "
    "if m.role == 'user' %}{{ cycler('a', 'b').next() }}{{ dict(a=1) | dictsort }}{% else %}none{% endfor %}",
)


def _chat_template(place: Path) -> Target:
    def read(number: int, data: bytes) -> None:
        template = ChatTemplate(data.decode("utf-8", "replace"), {"bos_token": "<s>"})
        template.render(_MESSAGES, tools=_TOOLS if "tools" in template.variables else None)

    return Target("chat_template", [text.encode() for text in _TEMPLATES], mutate_text, read)


def _chat_messages(place: Path) -> Target:
    templates = [ChatTemplate(text, {"bos_token": "<s>"}) for text in _TEMPLATES]

    def read(number: int, data: bytes) -> None:
        try:
            messages = json.loads(data)
        except (ValueError, RecursionError):
            return
        template = templates[len(data) % len(templates)]
        template.render(messages, tools=_TOOLS if "tools" in template.variables else None)

    return Target("chat_messages", [json.dumps(_MESSAGES).encode()], mutate_json, read)


def make_targets(scratch: Path, names: Sequence[str] = ()) -> list[Target]:
    """Return the targets `names`, all if empty, with their files in folders of `scratch`."""
    targets = []
    for name in names or TARGETS:
        place = scratch / name
        place.mkdir()
        target: Target = globals()[f"_{name}"](place)
        assert target.name == name
        targets.append(dataclasses.replace(target))
    return targets
