"""Whether the plans of a saved engine are what this version would build, and what they compute on the GPU at hand."""

from __future__ import annotations

import torch

from llmengine.backends.tensorrt.library import Library, load_library
from llmengine.backends.tensorrt.obtain import producer_of
from llmengine.backends.tensorrt.plan_set import PlanSet, SavedSet
from llmengine.backends.tensorrt.runtime import PlanRuntime
from llmengine.backends.tensorrt.segments import load_plans
from llmengine.backends.tensorrt.spec import BuildTarget, PlacedSegment, plans_of, segments_of
from llmengine.backends.tensorrt.verify import device_name, verify_plans
from llmengine.checkpoints.source import ModelSource
from llmengine.errors import CorruptFileError, EngineError


def check_plans(source: ModelSource) -> tuple[list[str], str]:
    """Return what is wrong with the plans of a saved engine, and what was run on a GPU or why nothing was.

    Where a GPU and the library that built them are here, every plan is run and compared with torch.
    """
    assert source.plans is not None
    try:
        saved = SavedSet.read(source.plans, "plans")
    except CorruptFileError as error:
        return [str(error)], "not run on a GPU: what the manifest says of the plans cannot be read"
    segments = _segments(saved, source)
    problems = [
        f"plan {name!r} is of another network than this version of llmengine builds; loading builds it again"
        for name, segment in plans_of(segments).items()
        if saved.fingerprints.get(name) != segment.spec.fingerprint()
    ]
    if problems:
        return problems, "not run on a GPU: the plans are of another version of llmengine"
    try:
        library, device = _runnable(saved)
    except EngineError as error:
        return [], f"not run on a GPU: {error}"
    plans = {name: saved.plans[name] for name in plans_of(segments)}
    plan_set = PlanSet(saved.producer, segments, plans, saved.verification, saved.read_library_cache())
    return run_plans(plan_set, source, library, device)


def _segments(saved: SavedSet, source: ModelSource) -> tuple[PlacedSegment, ...]:
    spec = next(iter(saved.specs.values()))
    return tuple(segments_of(source.arch, spec.dtype, saved.profiles, spec.weight_mode, spec.quantization))


def _runnable(saved: SavedSet) -> tuple[Library, torch.device]:
    """Return what the plans can be run with; raises `EngineError` with the reason if there is nothing."""
    if not torch.cuda.is_available():
        raise EngineError("there is none, or torch does not see it")
    library, device = load_library(), torch.device("cuda", 0)
    major, minor = torch.cuda.get_device_capability(device)
    library.check_device(major, minor)
    here = producer_of(library, BuildTarget((10 * major + minor,)), torch.cuda.get_device_name(device))
    if reasons := saved.producer.mismatches(here):
        raise EngineError(f"{'; '.join(reasons)}; loading builds them again")
    return library, device


def run_plans(plan_set: PlanSet, source: ModelSource, library: Library, device: torch.device) -> tuple[list[str], str]:
    """Run every plan on `device` and compare it with torch; returns as `check_plans` does."""
    spec = plan_set.segments[0].spec
    weights = None
    if spec.weight_mode != "inputs":
        weights = {name: tensor.to(device) for name, tensor in source.weights(getattr(torch, spec.dtype))}
    try:
        plans = load_plans(PlanRuntime(library, plan_set.library_cache), plan_set)
        verification = verify_plans(plan_set.segments, plans, device, weights)
    except EngineError as error:
        return [str(error)], f"run on {device_name(device)}: failed"
    checked = f"run on {verification.device} with {verification.library}: {len(verification.checks)} outputs compared"
    return [str(failure) for failure in verification.failures], checked
