"""Work on engine directories without a running engine: build one with TensorRT plans, inspect it, verify it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from llmengine.checkpoints.dequantized_source import without_blocks
from llmengine.checkpoints.engine_dir import (
    MANIFEST_NAME,
    described_engine,
    open_engine,
    read_files,
    read_manifest,
    require_replaceable,
)
from llmengine.checkpoints.metadata_fields import Fields
from llmengine.checkpoints.model_saving import save_model
from llmengine.checkpoints.opening import open_model
from llmengine.checkpoints.sharded_source import ShardPlan
from llmengine.checkpoints.source import ModelSource
from llmengine.config import ModelConfig, SchedulerConfig
from llmengine.dtypes import DTypeChoice, torch_dtype
from llmengine.errors import LLMEngineError, ModelLoadError

if TYPE_CHECKING:
    from llmengine.backends.tensorrt.build_engine import BuildOptions, EngineBuild
    from llmengine.backends.tensorrt.library import Flavour
    from llmengine.backends.tensorrt.spec import WeightMode
    from llmengine.backends.tensorrt.weight_choice import LayerTimes

_NO_PRODUCTS = "TensorRT has no product with them"


def build(
    model: Path,
    directory: Path,
    write: Callable[[str], None],
    *,
    compute_capabilities: tuple[int, ...] = (),
    flavour: Literal["auto"] | Flavour = "auto",
    dtype: DTypeChoice = "auto",
    weight_mode: Literal["fastest"] | WeightMode | None = None,
    scheduler_config: SchedulerConfig | None = None,
    load_format: Literal["auto", "dummy"] = "auto",
    tp_size: int = 1,
) -> EngineBuild:
    """Build a model's TensorRT plans and save them with its weights in `directory`.

    Args:
        tp_size: GPUs that share the model; the plans are those of all of them.
        write: called with lines about the progress, unless stderr is a terminal, which shows a bar.
        scheduler_config: the limits that the plans are built for, by default those of an accelerator.

    See `backends.tensorrt.build_engine` for the other arguments (`BuildOptions`) and for errors (`build_engine`).
    """
    options = _options(
        model,
        scheduler_config,
        compute_capabilities=compute_capabilities,
        flavour=flavour,
        dtype=dtype,
        weight_mode=weight_mode,
        tp_size=tp_size,
    )
    source = without_blocks(open_model(model, load_format), _NO_PRODUCTS)
    from llmengine.backends.tensorrt.build_engine import build_engine
    from llmengine.backends.tensorrt.build_progress import BuildProgress
    from llmengine.tokenizer.loading import tokenizer_to_save

    return build_engine(source, directory, options, tokenizer_to_save(source), BuildProgress(write))


def build_without_plans(
    model: Path,
    directory: Path,
    tp_size: int,
    dtype: DTypeChoice = "auto",
    load_format: Literal["auto", "dummy"] = "auto",
) -> None:
    """Write a model's weights as an engine directory, without plans, provided that `tp_size` processes can share it.

    The directory is the same for every `tp_size`: a process reads its part of it while loading. With a `dtype`, blocks
    of GGUF files are dequantized. Raises `ConfigError` that names the sizes that work, and what `save_model` raises.
    """
    require_replaceable(directory)
    source = open_model(model, load_format)
    if dtype == "auto":
        dtype = source.checkpoint_dtype
    else:
        source = without_blocks(source, f"dtype={dtype!r}")
    ShardPlan(source.arch, source.formats, tp_size)
    from llmengine.tokenizer.loading import tokenizer_to_save

    weights = source.weights(torch_dtype(dtype))
    tokenizer = tokenizer_to_save(source)
    save_model(directory, source, weights, dtype=dtype, formats=source.formats, tokenizer=tokenizer)


def measure_layer(model: Path, scheduler_config: SchedulerConfig | None = None) -> LayerTimes | None:
    """Times of a layer on this machine's GPU, with its weights as inputs and with its weights built in.

    None for a model of one layer. The limits are those of `build`. Raises what `build` raises with
    `weight_mode="fastest"`.
    """
    options = _options(model, scheduler_config)
    source = without_blocks(open_model(model), _NO_PRODUCTS)
    from llmengine.backends.tensorrt.build_engine import measure_layer as measure

    return measure(source, options)


def _options(model: Path, scheduler_config: SchedulerConfig | None, **chosen: Any) -> BuildOptions:
    limits = ModelConfig(model, scheduler_config=scheduler_config or SchedulerConfig()).resolve(accelerator=True)
    from llmengine.backends.tensorrt.build_engine import BuildOptions

    return BuildOptions(
        max_batch_size=limits.scheduler_config.max_batch_size,
        max_tokens_per_step=limits.scheduler_config.max_tokens_per_step,
        **chosen,
    )


def inspect(directory: Path) -> dict[str, Any]:
    """The checked manifest of a saved engine, with its path, size and weight format; reads no other file.

    Raises `ModelLoadError`, `CorruptFileError`, `UnsupportedModelError`.
    """
    manifest = _manifest(directory)
    files = read_files(directory, manifest)
    source = described_engine(directory, manifest, files)
    if source.plans is not None:
        from llmengine.backends.tensorrt.plan_set import SavedPlanSet

        SavedPlanSet.read(source.plans, f"{manifest.where}: plans")
    size_bytes = sum(file.size_bytes for file in files.values())
    facts = {"directory": str(directory), "size_bytes": size_bytes, "weight_format": str(source.formats)}
    return {**facts, **manifest.values}


def verified(verification: Mapping[str, Any] | None) -> str:
    """One line on the verification of the plans that a manifest records."""
    if verification is None:
        return "no: not run on any GPU yet"
    from llmengine.backends.tensorrt.verify import Verification

    found = Verification.from_dict(verification)
    if found is None:
        return "no: the record of it is from another version of llmengine"
    where = f"on {found.device} with {found.library}, {found.date}"
    if found.failures:
        return f"FAILED {where}: {'; '.join(map(str, found.failures))}"
    text = f"{where}: {len(found.checks)} outputs agree with torch"
    if not found.step_us:
        return text
    steps = ", ".join(f"{n}: {ours:.0f} / {theirs:.0f}" for n, (ours, theirs) in found.step_us.items())
    return f"{text}; dense part of a decode step in us by requests, TensorRT / torch: {steps}"


@dataclass(slots=True)
class Findings:
    """The results of `verify`.

    Attributes:
        files: name -> fault of the file; None for a sound file.
        problems: other faults, such as those of plans that fail on this machine's GPU.
        device: what was run on a GPU, or why nothing was.
    """

    files: dict[str, str | None] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    device: str = ""

    @property
    def sound(self) -> bool:
        """True if nothing is wrong."""
        return not self.problems and not any(self.files.values())


def verify(directory: Path) -> Findings:
    """Check the manifest of a saved engine and the size and hash of each file; run its plans if possible.

    Raises what `inspect` raises for a manifest that cannot be used.
    """
    findings = Findings()
    findings.files[MANIFEST_NAME] = None
    for name, file in read_files(directory, _manifest(directory)).items():
        findings.files[name] = _problem(file.check)
    source: ModelSource | None = None
    if findings.sound:
        try:
            source = open_engine(directory)
        except LLMEngineError as error:
            findings.problems.append(str(error))
    if source is None:
        findings.device = "not run on a GPU: the files are not sound"
    elif source.plans is None:
        findings.device = "not run on a GPU: there are no plans"
    else:
        from llmengine.backends.tensorrt.verify_engine import verify_saved_plans

        problems, findings.device = verify_saved_plans(source)
        findings.problems += problems
    return findings


def _manifest(directory: Path) -> Fields:
    try:
        is_engine = (directory / MANIFEST_NAME).is_file()
    except OSError as error:
        raise ModelLoadError(f"{directory} cannot be read: {error.strerror or error}") from error
    if not is_engine:
        raise ModelLoadError(f"{directory} is not a saved engine: it has no {MANIFEST_NAME}")
    return read_manifest(directory)


def _problem(check: Callable[[], None]) -> str | None:
    try:
        check()
    except LLMEngineError as error:
        return str(error)
    return None
