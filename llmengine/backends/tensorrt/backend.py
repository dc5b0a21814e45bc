"""The meaning of `backend="auto"` and `backend="tensorrt"` on a CUDA device: plans run a model, or torch does.

"tensorrt" uses plans that have passed verification, or raises. "auto" uses them if they are also at least as fast as
torch, else torch, and the log and `BackendInfo.description` say why. Verification and speed are found out once, when
plans are built or first run on a device, and kept with them: in the cache, and in a saved engine.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping
from functools import partial
from typing import TypeVar, cast

import torch

from llmengine.backends.cuda.backend import CudaBackend, CudaParts
from llmengine.backends.cuda.fused_segments import SegmentsContext, TunableSegments
from llmengine.backends.cuda.generic_segments import build_cuda_segments, cuda_segments_factory
from llmengine.backends.cuda.loading import load_cuda_backend, load_cuda_parts
from llmengine.backends.cuda.weights import load_weights
from llmengine.backends.shared_cuda.segments import Exchange
from llmengine.backends.tensorrt.build_progress import BuildProgress
from llmengine.backends.tensorrt.builder import default_num_processes
from llmengine.backends.tensorrt.cache import PlanCache
from llmengine.backends.tensorrt.library import Library, load_library
from llmengine.backends.tensorrt.obtain import PlanRequest, obtain_plans, producer_for_device
from llmengine.backends.tensorrt.plan_set import PlanSet
from llmengine.backends.tensorrt.plan_weights import device_weights, segment_weights
from llmengine.backends.tensorrt.runtime import LoadedPlan, PlanRuntime
from llmengine.backends.tensorrt.segments import TensorRtSegments, load_plans
from llmengine.backends.tensorrt.step_times import dense_step_us, mean_speedup, timed_batch_sizes
from llmengine.backends.tensorrt.verify import Verification, joined, verify_plans
from llmengine.checkpoints.saved_files import SavedPlans
from llmengine.checkpoints.source import ModelSource
from llmengine.config import ModelConfig
from llmengine.errors import ConfigError, CorruptFileError, EngineError, ModelLoadError

_logger = logging.getLogger("llmengine.tensorrt")

T = TypeVar("T")


def load_tensorrt_or_torch(config: ModelConfig, source: ModelSource, device: torch.device) -> CudaBackend:
    """The backend for a CUDA device, where `config.backend` is "auto" or "tensorrt".

    Builds the plans if neither a saved engine nor the cache has them. Raises `ConfigError` if TensorRT was asked for by
    name and cannot be used, with the reason and how to get what is missing.
    """
    try:
        choice = prepare_plans(config, source, device)
    except EngineError as failure:
        return load_cuda_backend(config, source, device, cuda_segments_factory(reason_for_torch(config, failure)))
    return load_tensorrt_backend(config, source, device, choice)


def reason_for_torch(config: ModelConfig, failure: EngineError) -> str:
    """Why "auto" takes torch, which is logged; raises `ConfigError` if TensorRT was asked for by name."""
    if config.backend == "tensorrt":
        raise _unusable(failure) from failure
    level = logging.INFO if isinstance(failure, ConfigError) else logging.WARNING
    reason = f"TensorRT cannot be used: {_text_with_notes(failure)}"
    _logger.log(level, "backend='auto' uses torch: %s", reason)
    return reason


def prepare_plans(config: ModelConfig, source: ModelSource, device: torch.device) -> SegmentsChoice:
    """The plans of a model for a device, with the choice that remains; raises as `obtain_plans` does."""
    library, cache = load_library(), PlanCache()
    request = plan_request(config, source, library, device)
    plan_set = obtain_plans(request, source, default_num_processes(library), cache=cache, progress=BuildProgress())
    return SegmentsChoice(load_library, plan_set, source, cache, is_required=config.backend == "tensorrt")


def plan_request(config: ModelConfig, source: ModelSource, library: Library, device: torch.device) -> PlanRequest:
    """The plans of a model, or of all ranks that share it, for GPUs like `device`.

    Raises `ConfigError` if the library does not support them.
    """
    limits = config.scheduler_config
    return PlanRequest(
        arch=source.arch,
        dtype=source.checkpoint_dtype if config.dtype == "auto" else config.dtype,
        max_batch_size=limits.max_batch_size,
        max_tokens_per_step=limits.max_tokens_per_step,
        producer=producer_for_device(library, device),
        formats=source.formats,
        device_uuid=f"GPU-{torch.cuda.get_device_properties(device).uuid}" if device.index else None,
        tp_size=config.parallel_config.tp_size,
    )


def load_tensorrt_backend(
    config: ModelConfig, source: ModelSource, device: torch.device, choice: SegmentsChoice
) -> TensorRtBackend:
    """The backend of a model whose segments `choice` builds; raises as `load_cuda_parts` and its `build` do."""
    return TensorRtBackend(load_cuda_parts(config, source, device, choice.build), choice)


class TensorRtBackend(CudaBackend):
    """The CUDA backend of a model that has plans. They are saved with its weights, even if torch turned out faster."""

    def __init__(self, parts: CudaParts, choice: SegmentsChoice) -> None:
        super().__init__(parts)
        self._choice = choice
        choice.store_compiled_kernels()

    def saved_plans(self) -> SavedPlans | None:
        """The plans and the findings about them; None, with a warning, if their files are missing or have changed.

        The weights can still be saved then. Loading them rebuilds the plans.
        """
        saved = self._choice.plan_set.to_saved()
        try:
            for file in saved.files.values():
                file.check()
        except CorruptFileError as failure:
            _logger.warning("the engine is saved without plans, and loading it will rebuild them: %s", failure)
            return None
        return saved

    def close(self) -> None:
        """Release all device memory; idempotent. Steps in flight are waited for."""
        self._choice.store_compiled_kernels()
        super().close()


class SegmentsChoice:
    """The choice of a model's segments: plans if they can be trusted and, with "auto", are not slower than torch.

    Ranks that share a model choose together: what one of them finds counts for all.

    Args:
        find_library: the library that runs the plans; raises `ConfigError` if it is not there.
        plan_set: of the model, or of all ranks that share it.
        source: the model, or this rank's shard of it.
        is_required: TensorRT was asked for by name, so torch is not an alternative.
        exchange: with the other ranks; None if there are none.

    Attributes:
        plan_set: the plans, with the findings so far.
    """

    def __init__(
        self,
        find_library: Callable[[], Library],
        plan_set: PlanSet,
        source: ModelSource,
        cache: PlanCache,
        *,
        is_required: bool,
        exchange: Exchange | None = None,
    ) -> None:
        self.plan_set = plan_set
        self._find_library, self._source, self._cache, self._is_required = find_library, source, cache, is_required
        self._exchange = exchange
        self._rank = 0 if exchange is None else exchange.rank
        self._own = plan_set.of_rank(self._rank)
        self._runtime: PlanRuntime | None = None
        self._has_loaded_weights = False
        self._is_streaming = False

    def build(self, context: SegmentsContext) -> TunableSegments:
        """The segments; raises `ConfigError` if TensorRT was asked for by name and fails, of ranks on rank 0.

        Plans that contain weights are verified with these, and quantized weights are rearranged for plans that take
        them as inputs: the weights are then loaded here, once for the model.
        """
        chosen = self._choose(context)
        return dataclasses.replace(chosen, has_loaded_weights=self._has_loaded_weights)

    def _choose(self, context: SegmentsContext) -> TunableSegments:
        try:
            return self._verified_segments(context)
        except (EngineError, torch.OutOfMemoryError) as failure:
            if self._is_streaming:
                raise
            if self._is_required and self._rank == 0:  # which ends the others
                raise _unusable(failure) from failure
            reason = f"TensorRT cannot be used: {failure}"
            _logger.warning("backend='auto' uses torch: %s", reason)
            return cuda_segments_factory(reason)(context)

    def store_compiled_kernels(self) -> None:
        """Keep kernels that were compiled since the last call, for the next start."""
        try:
            content = None if self._runtime is None else self._runtime.cache_content()
        except EngineError as failure:
            _logger.warning("%s; the next start compiles again", failure)
            return
        if content is not None and content != self.plan_set.library_cache:
            self.plan_set = self.plan_set.replace(library_cache=content)
            self._cache.store_findings(self.plan_set)

    def _verified_segments(self, context: SegmentsContext) -> TunableSegments:
        plans: dict[str, LoadedPlan] = {}

        def verify() -> Verification:
            self._runtime = PlanRuntime.start(self._find_library(), self.plan_set.library_cache)
            plans.update(load_plans(self._runtime, self._own))
            return self._verification(plans, context)

        verification = joined(together(self._exchange, verify))
        self._store_verification(verification)
        if verification.failures:
            worst = verification.failures[0]
            raise EngineError(f"plans of {verification.library} disagree with torch on {verification.device}: {worst}")
        if not self._own.has_constants and not self._source.formats.is_dense:
            # Other ranks may wait for weights that rank 0 calibrates: a rank that fails here ends, and all with it.
            self._is_streaming = self._exchange is not None
            self._load_weights(context)
            self._is_streaming = False
        found: list[TensorRtSegments] = []
        together(self._exchange, lambda: found.append(self._allocate(plans, context)))
        tunable = TunableSegments(found[0], f"{verification.library} plans")
        return tunable if self._is_required else self._faster(tunable, found[0], verification, context)

    def _allocate(self, plans: Mapping[str, LoadedPlan], context: SegmentsContext) -> TensorRtSegments:
        weights = None
        if self._own.has_constants:
            _logger.warning("the plans contain weights, which take device memory twice: save() needs the other copy")
        elif not self._source.formats.is_dense:
            weights = device_weights(self._own.segments, context.weights)
        return TensorRtSegments.allocate(self._own.segments, plans, context, weights)

    def _verification(self, plans: Mapping[str, LoadedPlan], context: SegmentsContext) -> Verification:
        """That of all plans if it is known, else of this rank's."""
        device = context.logits.device
        known = None if self.plan_set.verification is None else Verification.from_dict(self.plan_set.verification)
        if known is not None and known.holds_for(str(self._find_library()), device):
            return known
        weights_of = None
        if self._own.has_constants:
            self._load_weights(context)
            weights_of = partial(segment_weights, weights=context.weights)
        verification = verify_plans(self._own.segments, plans, device, weights_of)
        _logger.info("plans compared with torch on %s: %s", device, "; ".join(map(str, verification.checks)))
        return verification

    def _load_weights(self, context: SegmentsContext) -> None:
        """Load the weights into their places, if they are not there yet."""
        if not self._has_loaded_weights:
            load_weights(context.weights, self._source)
            self._has_loaded_weights = True

    def _faster(
        self,
        tunable: TunableSegments,
        segments: TensorRtSegments,
        verification: Verification,
        context: SegmentsContext,
    ) -> TunableSegments:
        """`tunable`, or torch's segments if the dense part of a decode step takes less time with them.

        Of ranks, rank 0 measures its own part of a step, without the sums.
        """
        torch_segments: list[TunableSegments] = []

        def measure() -> Mapping[int, tuple[float, float]]:
            if self._rank:
                return {}
            alone = dataclasses.replace(context, peers=None)
            ours = segments if context.peers is None else segments.without_sums()
            torch_segments.append(build_cuda_segments(alone))
            return {
                num_tokens: (
                    dense_step_us(ours, alone, num_tokens),
                    dense_step_us(torch_segments[0].segments, alone, num_tokens),
                )
                for num_tokens in timed_batch_sizes(context.config.scheduler_config.max_batch_size)
            }

        if not verification.step_us:
            verification = dataclasses.replace(verification, step_us=together(self._exchange, measure)[0])
            self._store_verification(verification)
        listed = ", ".join(f"{n}: {ours:.0f} and {theirs:.0f}" for n, (ours, theirs) in verification.step_us.items())
        _logger.info("microseconds of a decode step's dense part by requests, with TensorRT and with torch: %s", listed)
        gain = mean_speedup(verification.step_us)
        if gain >= 1.0:
            return tunable
        reason = f"torch is {1 / gain:.2f} times as fast as {verification.library}"
        _logger.info("backend='auto' uses torch: %s", reason)
        if context.peers is not None or not torch_segments:
            return cuda_segments_factory(reason)(context)
        return dataclasses.replace(torch_segments[0], description=f"{torch_segments[0].description} ({reason})")

    def _store_verification(self, verification: Verification) -> None:
        found = verification.to_dict()
        if found != self.plan_set.verification:
            self.plan_set = self.plan_set.replace(verification=found)
            if self._rank == 0:
                self._cache.store_findings(self.plan_set)


def together(exchange: Exchange | None, step: Callable[[], T]) -> list[T]:
    """What `step` gives on each rank, in the order of ranks; all of them call this.

    Raises on all ranks if it raises on any: an `EngineError` that names the rank and the cause. Without other ranks it
    raises what `step` does.
    """
    if exchange is None:
        return [step()]
    own, error, text = None, None, None
    try:
        own = step()
    except (EngineError, torch.OutOfMemoryError) as failure:
        error, text = failure, str(failure)
    found = exchange.of_all((text, own))
    if isinstance(error, ModelLoadError):
        raise error
    failed = [f"rank {rank}: {text}" for rank, (text, _) in enumerate(found) if text is not None]
    if failed:
        raise EngineError("; ".join(failed)) from error
    return [cast(T, result) for _, result in found]


def _unusable(failure: Exception) -> EngineError:
    """The error to raise if TensorRT was asked for by name; errors about damaged model files remain as they are."""
    if isinstance(failure, ModelLoadError):
        return failure
    return ConfigError(
        f"backend='tensorrt' cannot be used: {_text_with_notes(failure)}; backend='auto' uses torch in that case"
    )


def _text_with_notes(failure: Exception) -> str:
    """The failure's message with its notes, such as the reason why plans had to be rebuilt."""
    return "; ".join([str(failure), *getattr(failure, "__notes__", ())])
