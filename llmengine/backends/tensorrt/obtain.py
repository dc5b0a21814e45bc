"""How a model gets its plans: from a saved engine, else from the cache of this machine, else by building them."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from llmengine.backends.tensorrt.build_progress import BuildProgress
from llmengine.backends.tensorrt.builder import BuiltPlan, PlanJob, build_plans
from llmengine.backends.tensorrt.cache import PlanCache, plan_key
from llmengine.backends.tensorrt.constant_weights import spool_constants
from llmengine.backends.tensorrt.library import Flavour, Library
from llmengine.backends.tensorrt.model_segments import segments_of, shard_segments_of
from llmengine.backends.tensorrt.plan_set import Plan, PlanSet, Producer, SavedPlanSet
from llmengine.backends.tensorrt.plan_weights import streamed_weights
from llmengine.backends.tensorrt.spec import (
    BuildTarget,
    PlacedSegment,
    ProfileSpec,
    SegmentSpec,
    WeightMode,
    make_profiles,
    segments_by_plan,
)
from llmengine.checkpoints.sharded_source import ShardPlan, shard_source
from llmengine.checkpoints.source import ModelSource
from llmengine.dtypes import ModelDType, torch_dtype
from llmengine.errors import ConfigError, CorruptFileError, EngineError
from llmengine.models.arch import ModelArch
from llmengine.models.sharding import Shard
from llmengine.quantization.int4 import Int4Groups
from llmengine.quantization.model_formats import DENSE_MODEL, ModelFormats

_logger = logging.getLogger("llmengine.tensorrt")

_QUANTIZED_INPUTS: tuple[Flavour, ...] = ("tensorrt_rtx",)
"""Libraries that dequantize weights that are inputs. NVIDIA documents only constants for `tensorrt`."""

BuildPlans = Callable[[Iterable[PlanJob], int], Iterator[BuiltPlan]]
"""The signature of `build_plans`. Its iterator is closed when the build is given up."""


@dataclass(frozen=True, slots=True)
class PlanRequest:
    """The plans that a model needs.

    Attributes:
        producer: the library and the devices to build for. Saved plans for more compute capabilities fit too.
        weight_mode: None: that of the saved engine, else "inputs", but "constants" for weights in int4 and for
            libraries that dequantize nothing else.
        formats: of the model's matrices.
        device_uuid: the GPU to measure on, None for the first; see `PlanJob`.
        tp_size: ranks that share the model, which all have GPUs of the producer's kind. The plans are those of all.
    """

    arch: ModelArch
    dtype: ModelDType
    max_batch_size: int
    max_tokens_per_step: int
    producer: Producer
    weight_mode: WeightMode | None = None
    formats: ModelFormats = DENSE_MODEL
    device_uuid: str | None = None
    tp_size: int = 1


def make_producer(library: Library, target: BuildTarget, device_name: str | None) -> Producer:
    """The producer for a library, a target that is not empty, and the name of the GPU, None without one."""
    assert target.compute_capabilities
    ordered = BuildTarget(tuple(sorted(set(target.compute_capabilities))))
    return Producer(library.name, library.version, ordered, device_name if library.features.timing_cache else None)


def producer_for_device(library: Library, device: torch.device) -> Producer:
    """The producer for one GPU; raises `ConfigError` if the library does not support it."""
    major, minor = torch.cuda.get_device_capability(device)
    library.check_device(major, minor)
    return make_producer(library, BuildTarget((10 * major + minor,)), torch.cuda.get_device_name(device))


def obtain_plans(
    request: PlanRequest,
    source: ModelSource,
    num_processes: int,
    *,
    cache: PlanCache | None = None,
    progress: BuildProgress | None = None,
    build: BuildPlans = build_plans,
) -> PlanSet:
    """The plans of a model, of all its ranks; those that neither a saved engine nor the cache has are built and cached.

    Saved plans that do not fit or are damaged are replaced, with a warning that names each reason. Ctrl-C ends a build
    at once, and the next one continues with the plans that were finished.

    Args:
        source: has the plans if it is a saved engine, and the weights, which are read if plans contain them.
        num_processes: plans that are built at the same time; see `default_num_processes`.

    Raises:
        ConfigError: no library here builds for the target, or plans of these formats for it, or for so many ranks.
        EngineError: a build failed, because the disk is full or memory ran out.
        CorruptFileError: weights that plans contain are damaged.
    """
    cache = cache or PlanCache()
    saved, reasons = _read_saved(source)
    segments = _segments(request, saved)
    needed = segments_by_plan(segments)
    plans: dict[str, Plan] = {}
    if saved is not None:
        reasons = [*saved.producer.mismatches(request.producer), *_differences(saved, request, segments[0].spec)]
        if not reasons:
            plans, reasons = saved.usable_plans(needed)
        if not reasons:
            found = PlanSet(saved.producer, segments, plans, saved.verification, saved.read_library_cache())
            return cache.with_findings(found)
        if not saved.producer.mismatches(request.producer):
            cache.seed_timings(request.producer, saved.read_library_cache())
    if reasons:
        _logger.warning("%s: saved plans have to be rebuilt: %s", source.path, "; ".join(reasons))
    missing = {name: segment for name, segment in needed.items() if name not in plans}
    try:
        plans |= _CachedBuild(request, source, cache, progress or BuildProgress(), build).obtain(missing, num_processes)
    except EngineError as error:
        if reasons:
            error.add_note(f"the saved plans cannot be used: {'; '.join(reasons)}")
        raise
    plan_set = PlanSet(request.producer, segments, {name: plans[name] for name in needed})
    cache.trim(plan_set)
    return cache.with_findings(plan_set)


def obtain_layer_plan(
    request: PlanRequest, source: ModelSource, cache: PlanCache | None = None, build: BuildPlans = build_plans
) -> PlanSet:
    """The plan of the first `mid` segment alone, from the cache or built; raises as `obtain_plans` does."""
    assert request.tp_size == 1, "a layer of a shard has no plan of its own"
    segment = _segments(request, None)[1]
    layer_build = _CachedBuild(request, source, cache or PlanCache(), BuildProgress(), build)
    return PlanSet(request.producer, (segment,), layer_build.obtain({segment.plan_name: segment}, 1))


def needed_segments(request: PlanRequest, source: ModelSource) -> tuple[PlacedSegment, ...]:
    """The segments whose plans `obtain_plans` would give; raises `ConfigError` as that does."""
    return _segments(request, _read_saved(source)[0])


def has_constants(segments: Iterable[PlacedSegment]) -> bool:
    """Whether plans contain weights."""
    return any(segment.spec.constant_weights for segment in segments)


def _read_saved(source: ModelSource) -> tuple[SavedPlanSet | None, list[str]]:
    """The plans of a saved engine, or the reason why they cannot be read."""
    if source.plans is None:
        return None, []
    try:
        return SavedPlanSet.read(source.plans, "plans"), []
    except CorruptFileError as error:
        return None, [str(error)]


def _segments(request: PlanRequest, saved: SavedPlanSet | None) -> tuple[PlacedSegment, ...]:
    """The segments of the model, with the profiles of saved plans where these accept every step."""
    mode = _weight_mode(request, saved)
    profiles = make_profiles(request.max_batch_size, request.max_tokens_per_step)
    if saved is not None and _cover(saved.profiles, profiles):
        profiles = saved.profiles
    segments = model_segments(request.arch, request.dtype, profiles, mode, request.formats, request.tp_size)
    _check_formats(segments, request.producer)
    return segments


def model_segments(
    arch: ModelArch,
    dtype: ModelDType,
    profiles: Sequence[ProfileSpec],
    weight_mode: WeightMode,
    formats: ModelFormats,
    tp_size: int,
) -> tuple[PlacedSegment, ...]:
    """The segments of a model, or of each of the ranks that share it; raises as `ShardPlan` and `segments_of` do."""
    if tp_size == 1:
        return tuple(segments_of(arch, dtype, profiles, weight_mode, formats))
    return tuple(shard_segments_of(ShardPlan(arch, formats, tp_size), dtype, profiles, weight_mode))


def _weight_mode(request: PlanRequest, saved: SavedPlanSet | None) -> WeightMode:
    """The weight mode asked for, else that of the saved engine, else what the library takes."""
    takes_inputs = request.formats.is_dense or request.producer.flavour in _QUANTIZED_INPUTS
    if request.weight_mode == "inputs" and not takes_inputs:
        raise ConfigError(
            f"{request.producer.flavour} dequantizes weights that a plan contains, not inputs; set weight_mode "
            "(--weights) to 'constants'"
        )
    if not takes_inputs:
        return "constants"
    # Inputs of 4 bits are dequantized into a buffer in each execution, constants are multiplied as they are.
    has_int4 = any(isinstance(kind, Int4Groups) for kind in request.formats.kinds)
    usual: WeightMode = "constants" if has_int4 else "inputs"
    return request.weight_mode or (saved.weight_mode if saved is not None else usual)


def _check_formats(segments: Sequence[PlacedSegment], producer: Producer) -> None:
    """Raise `ConfigError` for a format whose product is not built for a part of the target."""
    parts = (
        part
        for segment in segments_by_plan(segments).values()
        for name, _ in segment.spec.quantization
        for part in segment.spec.matrix_parts(name).values()
    )
    for part in parts:
        needed, least = part.least_capability, min(producer.target.compute_capabilities)
        if least < needed:
            usable = "'int8' or 'int4'" if least >= 80 else "'int8'"
            raise ConfigError(
                f"TensorRT plans of weights in format {str(part.format)!r} need compute capability {needed // 10}."
                f"{needed % 10}, and the target is {producer.target}; use quant_config.weights={usable}, or "
                "backend='torch'"
            )


def _cover(offered: tuple[ProfileSpec, ...], needed: tuple[ProfileSpec, ...]) -> bool:
    """Whether each offered profile accepts everything that its counterpart accepts."""
    return len(offered) == len(needed) and all(
        mine.tokens.max >= yours.tokens.max and mine.samples.max >= yours.samples.max
        for mine, yours in zip(offered, needed, strict=True)
    )


def _differences(saved: SavedPlanSet, request: PlanRequest, needed: SegmentSpec) -> list[str]:
    """Reasons why none of the saved plans can be a needed one; empty if they may be."""
    reasons = []
    if saved.tp_size != request.tp_size:
        reasons.append(f"they were built for tp_size={saved.tp_size}, not for {request.tp_size}")
    if saved.dtype != needed.dtype:
        reasons.append(f"they compute in {saved.dtype}, not in {needed.dtype}")
    if saved.weight_mode != needed.weight_mode:
        reasons.append(f"they have their weights as {saved.weight_mode}, not as {needed.weight_mode}")
    if saved.profiles != needed.profiles:
        reasons.append(f"they take up to {_limits(saved.profiles)}, and {_limits(needed.profiles)} are needed")
    return reasons


def _limits(profiles: tuple[ProfileSpec, ...]) -> str:
    return " and ".join(f"{profile.tokens.max} tokens ({profile.name})" for profile in profiles)


@dataclass(slots=True)
class _CachedBuild:
    """Takes plans from the cache and builds the others.

    Attributes:
        found: plan name -> plan, of those that are there so far.
        keys: plan name -> key in the cache.
    """

    request: PlanRequest
    source: ModelSource
    cache: PlanCache
    progress: BuildProgress
    build: BuildPlans
    found: dict[str, Plan] = field(default_factory=dict)
    keys: dict[str, str] = field(default_factory=dict)

    def obtain(self, missing: Mapping[str, PlacedSegment], num_processes: int) -> dict[str, Plan]:
        """Every missing plan, by name."""
        left = dict(missing)
        if not has_constants(left.values()):
            left = {name: segment for name, segment in left.items() if not self._find(name, segment.spec, None)}
        if not left:
            return self.found
        with self.cache.build_directory() as directory, self.progress:
            work = {name: _work(segment.spec) for name, segment in left.items()}
            self.progress.begin(work, str(self.request.producer))
            try:
                self._build_all(self._jobs(left, directory), num_processes)
            except OSError as error:
                raise EngineError(f"{directory}: building plans failed: {error.strerror or error}") from error
        return self.found

    def _build_all(self, jobs: Generator[PlanJob], num_processes: int) -> None:
        building = self.build(jobs, num_processes)
        try:
            for built in building:
                self.found[built.name] = self.cache.store(self.keys[built.name], built)
                self.progress.finished(built.name, built.size_bytes, built.cost)
        finally:
            for generator in (building, jobs):
                if isinstance(generator, Generator):
                    generator.close()

    def _jobs(self, left: Mapping[str, PlacedSegment], directory: Path) -> Generator[PlanJob]:
        """Yield the builds that are needed, each when its constants are complete."""
        for segment, weights in self._with_constants(left, directory):
            name = segment.plan_name
            if weights is not None and self._find(name, segment.spec, _file_sha256(weights)):
                weights.unlink()
                self.progress.finished(name, self.found[name].size_bytes, "built before")
                continue
            self.progress.started(name)
            producer, device_uuid = self.request.producer, self.request.device_uuid
            timings, output = self.cache.timing_file(producer), directory / f"{name}.plan"
            yield PlanJob(name, segment.spec, producer.target, output, weights, timings, device_uuid)

    def _with_constants(
        self, left: Mapping[str, PlacedSegment], directory: Path
    ) -> Iterator[tuple[PlacedSegment, Path | None]]:
        """Yield each segment with the file of its constants, None if it has none."""
        if not has_constants(left.values()):
            yield from ((segment, None) for segment in left.values())
            return
        dtype = torch_dtype(self.request.dtype)
        for rank in dict.fromkeys(segment.rank for segment in left.values()):
            source = shard_source(self.source, Shard(rank, self.request.tp_size))
            weights = streamed_weights(source.weights(dtype), source.formats, source.arch, dtype)
            yield from spool_constants([item for item in left.values() if item.rank == rank], weights, directory)

    def _find(self, name: str, spec: SegmentSpec, constants_sha256: str | None) -> bool:
        """Take a plan from the cache; whether it was there."""
        self.keys[name] = plan_key(spec, self.request.producer, constants_sha256)
        plan = self.cache.find(self.keys[name])
        if plan is not None:
            self.found[name] = plan
        return plan is not None


def _work(spec: SegmentSpec) -> int:
    """The quantity that the build's time is assumed to grow with: bytes of constants; 1 for a plan without any."""
    return sum(weight.size_bytes for weight in spec.constant_weights) or 1


def _file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
