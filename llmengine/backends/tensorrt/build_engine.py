"""`llmengine build`: saved engines with plans, for this machine's GPU or, where the library can, for others.

Plans are built and not run, except a layer's where the choice of the weight mode is measured.
"""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from llmengine.backends.tensorrt.build_progress import BuildProgress
from llmengine.backends.tensorrt.builder import default_num_processes
from llmengine.backends.tensorrt.cache import PlanCache
from llmengine.backends.tensorrt.library import Flavour, Library, load_library
from llmengine.backends.tensorrt.obtain import PlanRequest, make_producer, obtain_plans
from llmengine.backends.tensorrt.plan_set import PlanSet
from llmengine.backends.tensorrt.spec import BuildTarget, WeightMode
from llmengine.backends.tensorrt.weight_choice import LayerTimes, time_layer
from llmengine.checkpoints.engine_dir import require_replaceable
from llmengine.checkpoints.model_saving import save_model
from llmengine.checkpoints.source import ModelSource
from llmengine.dtypes import DTypeChoice, torch_dtype
from llmengine.errors import ConfigError


@dataclass(frozen=True, slots=True)
class BuildOptions:
    """The plans to build.

    Attributes:
        compute_capabilities: 89 for SM 8.9; empty for the first GPU of this machine.
        flavour: "auto": the library that is installed.
        dtype: "auto": the checkpoint's.
        weight_mode: None: as in the saved engine that is rebuilt, else as `PlanRequest` says. "fastest": a layer is
            timed both ways on this machine's GPU, which must be the only target.
        max_batch_size: most requests in one step.
        max_tokens_per_step: most tokens in one step.
        tp_size: GPUs that share the model, all of the target's kind.
    """

    max_batch_size: int
    max_tokens_per_step: int
    compute_capabilities: tuple[int, ...] = ()
    flavour: Literal["auto"] | Flavour = "auto"
    dtype: DTypeChoice = "auto"
    weight_mode: Literal["fastest"] | WeightMode | None = None
    tp_size: int = 1


@dataclass(frozen=True, slots=True)
class EngineBuild:
    """A finished build, and the seconds that it took.

    Attributes:
        layer_times: the times that decided the weight mode; None if nothing was measured.
    """

    plans: PlanSet
    plans_s: float
    save_s: float
    layer_times: LayerTimes | None = None


def build_engine(
    source: ModelSource,
    directory: Path,
    options: BuildOptions,
    tokenizer: object,
    progress: BuildProgress | None = None,
    cache: PlanCache | None = None,
) -> EngineBuild:
    """Build the plans of a model and write them with its weights as an engine directory.

    The checkpoint is read once for the directory, and once more for plans that contain weights, whose builds take
    minutes and keep one layer on disk at a time.

    Raises as `obtain_plans` and `save_model` do. Raises `ConfigError` if no compute capability is given and there is no
    GPU, if the model cannot be divided so, and if the weight mode cannot be measured for the target.
    """
    require_replaceable(directory)
    library, request = _plan_request(source, options)
    begin = time.perf_counter()
    times = None
    if options.weight_mode == "fastest":
        times = _time_layer(library, request, source, cache)
        request = dataclasses.replace(request, weight_mode="inputs" if times is None else times.fastest)
    plans = obtain_plans(request, source, default_num_processes(library), cache=cache, progress=progress)
    built = time.perf_counter()
    save_model(
        directory,
        source,
        source.weights(torch_dtype(request.dtype)),
        dtype=request.dtype,
        formats=source.formats,
        tokenizer=tokenizer,
        plans=plans.to_saved(),
        quality=source.quality if request.dtype == source.checkpoint_dtype else None,
    )
    return EngineBuild(plans, built - begin, time.perf_counter() - built, times)


def measure_layer(source: ModelSource, options: BuildOptions, cache: PlanCache | None = None) -> LayerTimes | None:
    """The times by which `weight_mode="fastest"` would decide, on this machine's GPU; None for a model of one layer."""
    return _time_layer(*_plan_request(source, options), source, cache)


def _plan_request(source: ModelSource, options: BuildOptions) -> tuple[Library, PlanRequest]:
    library = _find_library(options.flavour)
    target, device_name = _target(library, options.compute_capabilities)
    request = PlanRequest(
        arch=source.arch,
        dtype=source.checkpoint_dtype if options.dtype == "auto" else options.dtype,
        max_batch_size=options.max_batch_size,
        max_tokens_per_step=options.max_tokens_per_step,
        producer=make_producer(library, target, device_name),
        weight_mode=None if options.weight_mode == "fastest" else options.weight_mode,
        formats=source.formats,
        tp_size=options.tp_size,
    )
    return library, request


def _time_layer(
    library: Library, request: PlanRequest, source: ModelSource, cache: PlanCache | None
) -> LayerTimes | None:
    """Time a layer on this machine's GPU; raises `ConfigError` if it is not the only target, or one of several."""
    if request.tp_size > 1:
        raise ConfigError(
            f"weight_mode='fastest' measures on one GPU, and tp_size={request.tp_size}; set weight_mode to 'inputs' or "
            "'constants'"
        )
    (here, _), target = _first_gpu(), request.producer.target
    if target.compute_capabilities != here:
        raise ConfigError(
            f"weight_mode='fastest' measures on this machine's GPU ({_gpu_text(here)}) and cannot choose for {target}; "
            "set weight_mode to 'inputs' or 'constants'"
        )
    return time_layer(request, source, library, torch.device("cuda", 0), cache)


def _find_library(flavour: Literal["auto"] | Flavour) -> Library:
    """The installed library; raises `ConfigError` if there is none, or if it is not `flavour`."""
    library = load_library()
    if flavour not in ("auto", library.name):
        raise ConfigError(f"flavour={flavour!r}, but {library} is installed; install {flavour} instead")
    return library


def _target(library: Library, compute_capabilities: tuple[int, ...]) -> tuple[BuildTarget, str | None]:
    """The target, and the name of this machine's GPU if that is the target."""
    here, name = _first_gpu()
    target = BuildTarget(compute_capabilities or here)
    if not target.compute_capabilities:
        raise ConfigError("there is no GPU to build for; give compute_capabilities (--sm), such as 89 for SM 8.9")
    library.check_target(target)
    if target.compute_capabilities == here:
        return target, name
    if not library.features.target_capabilities:
        raise ConfigError(
            f"{library} builds only for the GPU of this machine ({_gpu_text(here)}), not for {target}; install "
            "tensorrt_rtx to build for others"
        )
    return target, None


def _gpu_text(capabilities: tuple[int, ...]) -> str:
    return str(BuildTarget(capabilities)) if capabilities else "there is none"


def _first_gpu() -> tuple[tuple[int, ...], str | None]:
    """Compute capability and name of the first GPU; empty and None if there is none."""
    if not torch.cuda.is_available():
        return (), None
    major, minor = torch.cuda.get_device_capability(0)
    return (10 * major + minor,), torch.cuda.get_device_name(0)
