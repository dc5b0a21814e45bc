"""Where plans come from: a saved engine, else the cache of what this machine has built, else a build."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from llmengine.backends.tensorrt.build_progress import BuildProgress
from llmengine.backends.tensorrt.builder import BuiltPlan, PlanJob, build_plans, spool_weights
from llmengine.backends.tensorrt.cache import PlanCache, plan_key
from llmengine.backends.tensorrt.library import Library
from llmengine.backends.tensorrt.plan_set import Plan, PlanSet, Producer, SavedSet
from llmengine.backends.tensorrt.spec import (
    BuildTarget,
    PlacedSegment,
    ProfileSpec,
    SegmentSpec,
    WeightMode,
    make_profiles,
    plans_of,
    segments_of,
)
from llmengine.checkpoints.source import ModelSource, WeightStream
from llmengine.dtypes import ModelDType
from llmengine.errors import CorruptFileError, EngineError
from llmengine.models.arch import ModelArch

_logger = logging.getLogger("llmengine.tensorrt")

BuildPlans = Callable[[Iterable[PlanJob], int], Iterator[BuiltPlan]]
"""Has the signature of `build_plans`; its iterator is closed when the build is given up."""


@dataclass(frozen=True, slots=True)
class PlanRequest:
    """Which plans are wanted.

    Attributes:
        producer: of the library and the device at hand; plans for more compute capabilities than its target fit.
        weight_mode: None: as a saved engine has it, else "inputs".
        device_uuid: of the GPU at hand, None for the first; see `PlanJob`.
    """

    arch: ModelArch
    dtype: ModelDType
    max_batch_size: int
    max_tokens_per_step: int
    producer: Producer
    weight_mode: WeightMode | None = None
    device_uuid: str | None = None


def producer_of(library: Library, target: BuildTarget, device_name: str | None) -> Producer:
    """Return the producer for a library, a target that is not empty, and the name of the GPU, None without one."""
    assert target.compute_capabilities
    ordered = BuildTarget(tuple(sorted(set(target.compute_capabilities))))
    return Producer(library.name, library.version, ordered, device_name if library.features.timing_cache else None)


def get_plans(
    request: PlanRequest,
    source: ModelSource,
    num_workers: int,
    *,
    cache: PlanCache | None = None,
    progress: BuildProgress | None = None,
    build: BuildPlans = build_plans,
) -> PlanSet:
    """Return the plans that `request` wants, in part or all of them built now and kept in the cache.

    Plans of a saved engine that do not fit or are damaged are built again; a warning names each reason. Ctrl-C ends a
    build at once, and the next one goes on with the plans that were finished.

    Args:
        source: of the plans, if it is a saved engine; and of the weights, which are read if plans hold them.
        num_workers: plans that are built at the same time; see `default_workers`.

    Raises:
        ConfigError: no library here builds for the target.
        EngineError: building failed (a full disk, too little memory).
        CorruptFileError: the weights that plans hold are damaged.
    """
    cache = cache or PlanCache()
    saved, reasons = _read_saved(source)
    mode = request.weight_mode or (saved.weight_mode if saved is not None else "inputs")
    profiles = make_profiles(request.max_batch_size, request.max_tokens_per_step)
    if saved is not None and _cover(saved.profiles, profiles):
        profiles = saved.profiles
    segments = tuple(segments_of(request.arch, request.dtype, profiles, mode))
    needed = plans_of(segments)
    found: dict[str, Plan] = {}
    if saved is not None:
        wanted = next(iter(needed.values())).spec
        reasons = [*saved.producer.mismatches(request.producer), *_differences(saved, wanted)]
        if not reasons:
            reasons = _take(saved, needed, found)
    if reasons:
        _logger.warning("%s: %s; built again from the weights", source.path, "; ".join(reasons))
    if len(found) < len(needed):
        if saved is not None and not saved.producer.mismatches(request.producer):
            cache.seed_timings(request.producer, saved.read_library_cache())
        builder = _Builder(request, source, cache, progress or BuildProgress(), build, found)
        try:
            builder.complete(needed, num_workers)
        except EngineError as error:
            if reasons:
                error.add_note(f"the saved plans are not used: {'; '.join(reasons)}")
            raise
        found = {name: found[name] for name in needed}
    if saved is None or reasons:
        plan_set = PlanSet(request.producer, segments, found)
        cache.trim(plan_set)
    else:
        plan_set = PlanSet(saved.producer, segments, found, saved.verification, saved.read_library_cache())
    return cache.recall(plan_set)


def get_layer_plan(
    request: PlanRequest, source: ModelSource, cache: PlanCache | None = None, build: BuildPlans = build_plans
) -> PlanSet:
    """Return the plan of the first `mid` segment alone, from the cache or built; raises as `get_plans` does."""
    profiles = make_profiles(request.max_batch_size, request.max_tokens_per_step)
    segment = segments_of(request.arch, request.dtype, profiles, request.weight_mode or "inputs")[1]
    found: dict[str, Plan] = {}
    builder = _Builder(request, source, cache or PlanCache(), BuildProgress(), build, found)
    builder.complete({segment.plan_name: segment}, 1)
    return PlanSet(request.producer, (segment,), found)


def _read_saved(source: ModelSource) -> tuple[SavedSet | None, list[str]]:
    """Return the plans of a saved engine, or why there are none that can be read."""
    if source.plans is None:
        return None, []
    try:
        return SavedSet.read(source.plans, "plans"), []
    except CorruptFileError as error:
        return None, [str(error)]


def _cover(offered: tuple[ProfileSpec, ...], wanted: tuple[ProfileSpec, ...]) -> bool:
    """Return whether each offered profile takes what the wanted one takes."""
    return len(offered) == len(wanted) and all(
        mine.tokens.max >= yours.tokens.max and mine.samples.max >= yours.samples.max
        for mine, yours in zip(offered, wanted, strict=True)
    )


def _take(saved: SavedSet, needed: Mapping[str, PlacedSegment], found: dict[str, Plan]) -> list[str]:
    """Move the saved plans that are needed and whole to `found`; return what is wrong with the others."""
    reasons = []
    for name, segment in needed.items():
        if name not in saved.plans:
            reasons.append(f"there is no plan {name!r}")
        elif saved.fingerprints[name] != segment.spec.fingerprint():
            reasons.append(f"plan {name!r} is of another network than this version of llmengine builds")
        else:
            try:
                saved.plans[name].file.check()
                found[name] = saved.plans[name]
            except CorruptFileError as error:
                reasons.append(str(error))
    return reasons


def _differences(saved: SavedSet, wanted: SegmentSpec) -> list[str]:
    """Return why none of the saved plans can be what is wanted; empty if they may be."""
    found = []
    if saved.dtype != wanted.dtype:
        found.append(f"the plans are of {saved.dtype}, wanted is {wanted.dtype}")
    if saved.weight_mode != wanted.weight_mode:
        found.append(f"the plans have their weights as {saved.weight_mode}, wanted is {wanted.weight_mode}")
    if saved.profiles != wanted.profiles:
        found.append(f"the plans take up to {_limits(saved.profiles)}, wanted is {_limits(wanted.profiles)}")
    return found


def _limits(profiles: tuple[ProfileSpec, ...]) -> str:
    return " and ".join(f"{profile.tokens.max} tokens ({profile.name})" for profile in profiles)


@dataclass(slots=True)
class _Builder:
    """Adds plans to `found`: from the cache, else built.

    Attributes:
        keys: plan name -> key in the cache, of the plans being built.
    """

    request: PlanRequest
    source: ModelSource
    cache: PlanCache
    progress: BuildProgress
    build: BuildPlans
    found: dict[str, Plan]
    keys: dict[str, str] = field(default_factory=dict)

    def complete(self, needed: Mapping[str, PlacedSegment], num_workers: int) -> None:
        """Add every needed plan that is not there."""
        left = {name: segment for name, segment in needed.items() if name not in self.found}
        if not _holds_constants(next(iter(left.values())).spec):
            left = {name: segment for name, segment in left.items() if not self._in_cache(name, segment.spec, None)}
        if not left:
            return
        with self.cache.build_directory() as directory, self.progress:
            self.progress.begin(
                {name: _work(segment.spec) for name, segment in left.items()}, str(self.request.producer)
            )
            try:
                self._build_all(self._jobs(left, directory), num_workers)
            except OSError as error:
                raise EngineError(f"{directory}: building plans failed: {error.strerror or error}") from error

    def _build_all(self, jobs: Generator[PlanJob], num_workers: int) -> None:
        building = self.build(jobs, num_workers)
        try:
            for built in building:
                self.found[built.name] = self.cache.keep(self.keys[built.name], built)
                self.progress.finished(built.name, self.found[built.name])
        finally:
            for generator in (building, jobs):
                if isinstance(generator, Generator):
                    generator.close()

    def _jobs(self, left: Mapping[str, PlacedSegment], directory: Path) -> Generator[PlanJob]:
        """Yield what has to be built, as the weights of plans that hold any become complete."""
        for name, segment, weights in self._with_weights(left, directory):
            if weights is not None and self._in_cache(name, segment.spec, _digest(weights)):
                weights.unlink()
                self.progress.finished(name, self.found[name], from_cache=True)
                continue
            self.progress.started(name)
            producer, device_uuid = self.request.producer, self.request.device_uuid
            timings, output = self.cache.timing_file(producer), directory / f"{name}.plan"
            yield PlanJob(name, segment.spec, producer.target, output, weights, timings, device_uuid)

    def _with_weights(
        self, left: Mapping[str, PlacedSegment], directory: Path
    ) -> Iterator[tuple[str, PlacedSegment, Path | None]]:
        if not _holds_constants(next(iter(left.values())).spec):
            yield from ((name, segment, None) for name, segment in left.items())
            return
        dtype = next(iter(left.values())).spec.dtype
        for segment, path in spool_weights(list(left.values()), _stream(self.source, dtype), directory):
            yield segment.plan_name, segment, path

    def _in_cache(self, name: str, spec: SegmentSpec, constants_sha256: str | None) -> bool:
        """Take a plan from the cache, if it is there."""
        self.keys[name] = plan_key(spec, self.request.producer, constants_sha256)
        plan = self.cache.find(self.keys[name])
        if plan is not None:
            self.found[name] = plan
        return plan is not None


def _holds_constants(spec: SegmentSpec) -> bool:
    return any(weight.source == "constant" for weight in spec.weights)


def _work(spec: SegmentSpec) -> int:
    """Return what a build's time is taken to grow with: its constants; the same for all plans without any."""
    return sum(weight.size_bytes for weight in spec.weights if weight.source == "constant") or 1


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _stream(source: ModelSource, dtype: ModelDType) -> WeightStream:
    import torch

    return source.weights(getattr(torch, dtype))
