"""What `backend="auto"` and `backend="tensorrt"` mean on a CUDA device: whether plans run a model there, or torch does.

"tensorrt" takes plans that have passed verification, or raises. "auto" takes them if they are also at least as fast as
torch, else torch; the log and `BackendInfo.description` say why. Verification and speed are found out once, when plans
are built or first run on a device, and kept with them: in the cache, and in a saved engine.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping

import torch

from llmengine.backends.cuda.backend import CudaBackend, CudaParts
from llmengine.backends.cuda.fused_segments import SegmentsContext, TunableSegments
from llmengine.backends.cuda.generic_segments import build_cuda_segments, cuda_segments_factory
from llmengine.backends.cuda.loading import load_cuda_backend, load_cuda_parts
from llmengine.backends.cuda.model import CudaWeights, load_weights
from llmengine.backends.tensorrt.build_progress import BuildProgress
from llmengine.backends.tensorrt.builder import default_workers
from llmengine.backends.tensorrt.cache import PlanCache
from llmengine.backends.tensorrt.library import Library, load_library
from llmengine.backends.tensorrt.obtain import PlanRequest, get_plans, producer_of
from llmengine.backends.tensorrt.plan_set import PlanSet
from llmengine.backends.tensorrt.runtime import LoadedPlan, PlanRuntime
from llmengine.backends.tensorrt.segments import TensorRtSegments, load_plans
from llmengine.backends.tensorrt.spec import BuildTarget
from llmengine.backends.tensorrt.step_times import speedup, time_us, timed_sizes
from llmengine.backends.tensorrt.verify import Verification, verify_plans
from llmengine.checkpoints.saved_plans import SavedPlans
from llmengine.checkpoints.source import ModelSource
from llmengine.config import ModelConfig
from llmengine.errors import ConfigError, CorruptFileError, EngineError, ModelLoadError
from llmengine.models.decoder import Segments, forward
from llmengine.quantization.model_formats import formats_in_use

_logger = logging.getLogger("llmengine.tensorrt")


def load_tensorrt_or_torch(config: ModelConfig, source: ModelSource, device: torch.device) -> CudaBackend:
    """Return the backend for a CUDA device that `config.backend`, "auto" or "tensorrt", asks for.

    Builds the plans if neither a saved engine nor the cache has them. Raises `ConfigError` if TensorRT was asked for by
    name and cannot be used, with the reason and how to get what is missing.
    """
    try:
        choice = prepare(config, source, device)
    except EngineError as failure:
        if config.backend == "tensorrt":
            raise _unusable(failure) from failure
        level = logging.INFO if isinstance(failure, ConfigError) else logging.WARNING
        _logger.log(level, "backend='auto': torch, since TensorRT cannot be used: %s", _said(failure))
        return load_cuda_backend(
            config, source, device, cuda_segments_factory(f"TensorRT cannot be used: {_said(failure)}")
        )
    return load_tensorrt_backend(config, source, device, choice)


def prepare(config: ModelConfig, source: ModelSource, device: torch.device) -> SegmentsChoice:
    """Return what decides for a model and a device, with its plans; see `get_plans` for what is raised."""
    library = load_library()
    major, minor = torch.cuda.get_device_capability(device)
    library.check_device(major, minor)
    if not formats_in_use(source.formats, config.quant_config).is_dense:
        raise ConfigError("plans of quantized weights are not in this version; set quant_config.weights='none'")
    limits = config.scheduler_config
    target = BuildTarget((10 * major + minor,))
    request = PlanRequest(
        arch=source.arch,
        dtype=source.checkpoint_dtype if config.dtype == "auto" else config.dtype,
        max_batch_size=limits.max_batch_size,
        max_tokens_per_step=limits.max_tokens_per_step,
        producer=producer_of(library, target, torch.cuda.get_device_name(device)),
        device_uuid=f"GPU-{torch.cuda.get_device_properties(device).uuid}" if device.index else None,
    )
    cache = PlanCache()
    plan_set = get_plans(request, source, default_workers(library), cache=cache, progress=BuildProgress())
    return SegmentsChoice(library, plan_set, source, cache, by_name=config.backend == "tensorrt")


def load_tensorrt_backend(
    config: ModelConfig, source: ModelSource, device: torch.device, choice: SegmentsChoice
) -> TensorRtBackend:
    """Load a model whose segments `choice` builds; raises what `load_cuda_parts` and `SegmentsChoice.build` do."""
    parts = load_cuda_parts(config, source, device, choice.build)
    choice.keep_cache()
    return TensorRtBackend(parts, choice)


class TensorRtBackend(CudaBackend):
    """The CUDA backend with plans, which are saved with its weights, also where torch turned out to be faster."""

    def __init__(self, parts: CudaParts, choice: SegmentsChoice) -> None:
        super().__init__(parts)
        self._choice = choice

    def saved_plans(self) -> SavedPlans | None:
        """Return the plans and what is known of them; None, and a warning, if their files have gone or changed since.

        The weights can still be saved then, and who loads them builds the plans again.
        """
        saved = self._choice.plan_set.to_saved()
        try:
            for file in saved.files.values():
                file.check()
        except CorruptFileError as failure:
            _logger.warning("saved without plans, loading will build them again: %s", failure)
            return None
        return saved

    def close(self) -> None:
        """Release all device memory; idempotent. Steps in flight are waited for."""
        self._choice.keep_cache()
        super().close()


class SegmentsChoice:
    """Makes the segments of a model: from plans if those can be trusted, and with "auto" are not slower.

    Args:
        by_name: torch is no choice.

    Attributes:
        plan_set: the plans, with what has been found out so far.
    """

    def __init__(
        self, library: Library, plan_set: PlanSet, source: ModelSource, cache: PlanCache, *, by_name: bool
    ) -> None:
        self.plan_set = plan_set
        self._library, self._source, self._cache, self._by_name = library, source, cache, by_name
        self._runtime: PlanRuntime | None = None

    def build(self, context: SegmentsContext) -> TunableSegments:
        """Return the segments; raises `ConfigError` if TensorRT was asked for by name and fails."""
        try:
            return self._build(context)
        except (EngineError, torch.OutOfMemoryError) as failure:
            if self._by_name:
                raise _unusable(failure) from failure
            _logger.warning("backend='auto': torch, since TensorRT cannot be used: %s", failure)
            return cuda_segments_factory(f"TensorRT cannot be used: {failure}")(context)

    def keep_cache(self) -> None:
        """Keep kernels that have been compiled since the last time for the next start."""
        try:
            content = None if self._runtime is None else self._runtime.cache_content()
        except EngineError as failure:
            _logger.warning("%s; the next start compiles again", failure)
            return
        if content is not None and content != self.plan_set.library_cache:
            self.plan_set = self.plan_set.replace(library_cache=content)
            self._cache.remember(self.plan_set)

    def _build(self, context: SegmentsContext) -> TunableSegments:
        self._runtime = PlanRuntime(self._library, self.plan_set.library_cache)
        plans = load_plans(self._runtime, self.plan_set)
        verification = self._verify(plans, context)
        if verification.failures:
            worst = verification.failures[0]
            raise EngineError(f"{self._library} computes something else than torch on {verification.device}: {worst}")
        if self._holds_weights():
            _logger.warning("the plans hold weights, which are in device memory twice: save() needs the others")
        segments = TensorRtSegments(self.plan_set.segments, plans, context)
        tunable = TunableSegments(segments, f"{self._library} plans")
        return tunable if self._by_name else self._faster(tunable, verification, context)

    def _verify(self, plans: Mapping[str, LoadedPlan], context: SegmentsContext) -> Verification:
        device = context.logits.device
        known = None if self.plan_set.verification is None else Verification.from_dict(self.plan_set.verification)
        if known is not None and known.holds_for(str(self._library), device):
            return known
        weights = None
        if self._holds_weights():
            load_weights(CudaWeights(context.tensors), self._source)
            weights = context.tensors
        verification = verify_plans(self.plan_set.segments, plans, device, weights)
        _logger.info("plans compared with torch on %s: %s", device, "; ".join(map(str, verification.checks)))
        self._remember(verification)
        return verification

    def _holds_weights(self) -> bool:
        return any(len(segment.spec.weight_inputs) < len(segment.spec.weights) for segment in self.plan_set.segments)

    def _faster(
        self, tunable: TunableSegments, verification: Verification, context: SegmentsContext
    ) -> TunableSegments:
        """Return `tunable`, or torch's segments if a dense decode step takes less time with them."""
        torch_segments: TunableSegments | None = None
        if not verification.step_us:
            torch_segments = build_cuda_segments(context)
            times = {
                num_tokens: (
                    dense_step_us(tunable.segments, context, num_tokens),
                    dense_step_us(torch_segments.segments, context, num_tokens),
                )
                for num_tokens in timed_sizes(context.config.scheduler_config.max_batch_size)
            }
            verification = dataclasses.replace(verification, step_us=times)
            self._remember(verification)
        listed = ", ".join(f"{n}: {ours:.0f} and {theirs:.0f}" for n, (ours, theirs) in verification.step_us.items())
        _logger.info("dense part of a decode step with TensorRT and with torch, us by requests: %s", listed)
        gain = speedup(verification.step_us)
        if gain >= 1.0:
            return tunable
        reason = f"torch is {1 / gain:.2f} times as fast as {self._library}"
        _logger.info("backend='auto': torch, since %s", reason)
        if torch_segments is None:
            return cuda_segments_factory(reason)(context)
        return dataclasses.replace(torch_segments, description=f"{torch_segments.description} ({reason})")

    def _remember(self, verification: Verification) -> None:
        self.plan_set = self.plan_set.replace(verification=verification.to_dict())
        self._cache.remember(self.plan_set)


def dense_step_us(segments: Segments, context: SegmentsContext, num_tokens: int) -> float:
    """Return the microseconds that all segments of a decode step take on the device, attention left out.

    The weights may hold anything: only time is looked at.
    """
    arch, device, dtype = context.arch, context.logits.device, context.tensors["embed_tokens.weight"].dtype
    x = torch.zeros((num_tokens, arch.hidden_size), dtype=dtype, device=device)
    attended = torch.zeros((num_tokens, arch.num_heads * arch.head_dim), dtype=dtype, device=device)

    def step() -> None:
        forward(segments, x, lambda layer, qkv: attended, None)

    return time_us([step], device)


def _unusable(failure: Exception) -> EngineError:
    """Return what is raised where TensorRT was asked for by name; damaged model files stay what they are."""
    if isinstance(failure, ModelLoadError):
        return failure
    return ConfigError(
        f"backend='tensorrt' cannot be used: {_said(failure)}; backend='auto' takes torch where that is so"
    )


def _said(failure: Exception) -> str:
    """Return the failure's message with its notes, such as why plans had to be built again."""
    return "; ".join([str(failure), *getattr(failure, "__notes__", ())])
