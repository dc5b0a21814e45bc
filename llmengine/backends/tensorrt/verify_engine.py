"""`llmengine verify`: the plans of a saved engine compared with this version's networks and, on a GPU, with torch."""

from __future__ import annotations

import torch
from torch import Tensor

from llmengine.backends.tensorrt.library import Library, load_library
from llmengine.backends.tensorrt.obtain import model_segments, producer_for_device
from llmengine.backends.tensorrt.plan_set import PlanSet, SavedPlanSet
from llmengine.backends.tensorrt.plan_weights import streamed_weights
from llmengine.backends.tensorrt.runtime import PlanRuntime
from llmengine.backends.tensorrt.segments import load_plans
from llmengine.backends.tensorrt.spec import PlacedSegment, segments_by_plan
from llmengine.backends.tensorrt.verify import WeightsOf, device_name, verify_plans
from llmengine.checkpoints.sharded_source import shard_source
from llmengine.checkpoints.source import ModelSource
from llmengine.dtypes import torch_dtype
from llmengine.errors import ConfigError, CorruptFileError, EngineError
from llmengine.models.sharding import Shard


def verify_saved_plans(source: ModelSource) -> tuple[list[str], str]:
    """The problems of a saved engine's plans, and one line on what was run on a GPU or why nothing was.

    If a GPU and the library that built the plans are here, every plan is run and compared with torch.
    """
    assert source.plans is not None
    try:
        saved = SavedPlanSet.read(source.plans, "plans")
    except CorruptFileError as error:
        return [str(error)], "not run on a GPU: the manifest does not describe them properly"
    try:
        segments = _segments(saved, source)
    except ConfigError as error:
        return [str(error)], "not run on a GPU: they were built by another version of llmengine"
    problems = [
        f"plan {name!r} was built from another network than this version of llmengine defines; loading rebuilds it"
        for name, segment in segments_by_plan(segments).items()
        if saved.fingerprints.get(name) != segment.spec.fingerprint()
    ]
    if problems:
        return problems, "not run on a GPU: they were built by another version of llmengine"
    try:
        library, device = _find_gpu(saved)
    except EngineError as error:
        return [], f"not run on a GPU: {error}"
    plans = {name: saved.plans[name] for name in segments_by_plan(segments)}
    plan_set = PlanSet(saved.producer, segments, plans, saved.verification, saved.read_library_cache())
    return verify_on_device(plan_set, source, library, device)


def _segments(saved: SavedPlanSet, source: ModelSource) -> tuple[PlacedSegment, ...]:
    spec = next(iter(saved.specs.values()))
    return model_segments(source.arch, spec.dtype, saved.profiles, spec.weight_mode, source.formats, saved.tp_size)


def _find_gpu(saved: SavedPlanSet) -> tuple[Library, torch.device]:
    """The library and the device that can run the plans; raises `EngineError` with the reason if there are none."""
    if not torch.cuda.is_available():
        raise EngineError("there is none, or torch does not see it")
    library, device = load_library(), torch.device("cuda", 0)
    if reasons := saved.producer.mismatches(producer_for_device(library, device)):
        raise EngineError(f"{'; '.join(reasons)}; loading rebuilds them")
    return library, device


def verify_on_device(
    plan_set: PlanSet, source: ModelSource, library: Library, device: torch.device
) -> tuple[list[str], str]:
    """Run every plan on `device` and compare it with torch; the result is that of `verify_saved_plans`."""
    weights_of: WeightsOf | None = None
    if plan_set.has_constants:
        dtype, weights = torch_dtype(plan_set.segments[0].spec.dtype), []
        for rank in range(plan_set.tp_size):
            own = shard_source(source, Shard(rank, plan_set.tp_size))
            stream = streamed_weights(own.weights(dtype), own.formats, own.arch, dtype)
            weights.append({name: tensor.to(device) for name, tensor in stream})

        def weights_of(segment: PlacedSegment) -> dict[str, Tensor]:
            return {name: weights[segment.rank][canonical] for name, canonical in segment.weight_names().items()}

    try:
        plans = load_plans(PlanRuntime.start(library, plan_set.library_cache), plan_set)
        verification = verify_plans(plan_set.segments, plans, device, weights_of)
    except EngineError as error:
        return [str(error)], f"run on {device_name(device)}: failed"
    checked = f"run on {verification.device} with {verification.library}: {len(verification.checks)} outputs compared"
    return [str(failure) for failure in verification.failures], checked
