"""Configuration. Mutable until `LLM` takes its own frozen copy; an unknown name raises at once (see `Settings`)."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import InitVar, dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, Self

from llmengine.checks import requirement
from llmengine.dtypes import DTypeChoice
from llmengine.errors import ConfigError
from llmengine.quant_config import PresetName
from llmengine.quant_config import QuantConfig as QuantConfig
from llmengine.settings import Settings, require_bool, require_choice, require_int, require_kind, require_number

BackendName = Literal["auto", "torch", "tensorrt"]
AttentionBackendName = Literal["auto", "flashinfer", "measure"]


@dataclass(slots=True)
class ParallelConfig(Settings):
    """How many processes share the matrices of each layer (`tp_size`), and how many share the layers (`pp_size`).

    A model is cut into `pp_size` stages of layers, each of which `tp_size` processes have. On GPUs each process takes
    one.

    Attributes:
        devices: the device of each process, "cpu" for all or a "cuda:N" for each: `["cuda:0", "cuda:2"]`. It takes the
            place of `ModelConfig.device`. None: those that follow `ModelConfig.device`.
    """

    tp_size: int = 1
    pp_size: int = 1
    devices: Sequence[str] | None = None

    def resolve(self) -> Self:
        """See `Settings.resolve`; `devices` becomes a tuple."""
        devices = self.devices
        if isinstance(devices, Sequence) and not isinstance(devices, str):
            devices = tuple(devices)
        return Settings.resolve(dataclasses.replace(self, devices=devices))

    def _check(self) -> None:
        require_int("parallel_config.tp_size", self.tp_size, 1)
        require_int("parallel_config.pp_size", self.pp_size, 1)
        if self.devices is not None:
            _check_devices(self.devices, self.tp_size * self.pp_size)


def _check_devices(devices: Sequence[str], num_ranks: int) -> None:
    name = "parallel_config.devices"
    if not isinstance(devices, tuple):
        raise requirement(ConfigError, name, "a list of devices", devices)
    for index, device in enumerate(devices):
        if not isinstance(device, str) or not re.fullmatch(r"cpu|cuda:[0-9]+", device):
            raise requirement(ConfigError, f"{name}[{index}]", "'cpu' or 'cuda:N'", device)
        if device != "cpu" and device in devices[:index]:
            raise ConfigError(f"{name}[{index}]={device!r} is there twice; each process needs a GPU of its own")
    if len(devices) != num_ranks:
        raise ConfigError(f"{name} has {len(devices)} devices; tp_size * pp_size is {num_ranks}")
    if "cpu" in devices and len(set(devices)) > 1:
        raise ConfigError(f"{name} must be all 'cpu' or all GPUs, not {list(devices)}")


@dataclass(slots=True)
class KvCacheConfig(Settings):
    """Size and behaviour of the paged KV cache.

    Attributes:
        free_memory_fraction: fraction, in (0, 1], of the memory that is free once the weights are loaded. None: 0.9 on
            an accelerator, 0.2 on a CPU, whose memory other programs share.
        max_bytes: upper bound in bytes; if both limits are set, the smaller one applies.
        block_size: tokens per block, a power of two.
        enable_prefix_caching: reuse KV blocks of equal prefixes across requests.
    """

    free_memory_fraction: float | None = None
    max_bytes: int | None = None
    block_size: int = 32
    enable_prefix_caching: bool = True

    def _check(self) -> None:
        if self.free_memory_fraction is not None:
            require_number("kv_cache_config.free_memory_fraction", self.free_memory_fraction, 0.0, 1.0, low_open=True)
        if self.max_bytes is not None:
            require_int("kv_cache_config.max_bytes", self.max_bytes, 1)
        require_int("kv_cache_config.block_size", self.block_size, 1)
        if self.block_size & (self.block_size - 1):
            raise requirement(ConfigError, "kv_cache_config.block_size", "a power of two", self.block_size)
        require_bool("kv_cache_config.enable_prefix_caching", self.enable_prefix_caching)


_LEAST, _MOST = 1e-9, 1e9
"""Range of times and weights, within which everything computed from them stays finite."""

BY_DEVICE = -1
"""Value of a limit that is left to the device."""

_LIMITS = {"max_batch_size": (64, 256), "max_tokens_per_step": (512, 2048), "max_tokens_per_mixed_step": (256, 1024)}
"""What `BY_DEVICE` stands for on a CPU and on an accelerator."""


@dataclass(slots=True)
class SchedulerConfig(Settings):
    """Limits of a step and of the queue, and the order of requests.

    Attributes:
        max_batch_size: most requests in one step; `BY_DEVICE`: 64 on a CPU, 256 on an accelerator.
        max_tokens_per_step: most tokens in one step; longer prompts are computed in chunks. `BY_DEVICE`: 512 on a CPU,
            2048 on an accelerator.
        max_tokens_per_mixed_step: the same limit for a step that also decodes. It is lower, so that a prompt delays the
            tokens of running requests by a bounded time. `BY_DEVICE`: 256 on a CPU, 1024 on an accelerator.
        max_queued_requests: most requests that wait for their first step; one more raises `QueueFullError`. It is also
            the limit of paused requests (`slow_consumer="pause"`), above which the one paused longest is aborted.
        max_queued_tokens: most prompt tokens of all waiting requests; a request always fits into an empty queue.
        max_preemptions: a request that was preempted this often is spared while another request can be preempted.
        max_unread_tokens: number of unread tokens at which a request with `slow_consumer` "pause" or "abort" is paused
            or aborted; steps in flight may add a few more.
        step_timeout_s: seconds after which a call into the backend counts as hanging: the engine is declared dead, with
            a `TimeoutError` as the cause. Choose far more than the slowest step takes, since a step may compile
            kernels. None: no limit.
        max_decode_latency_ms: target for the duration of a step that decodes. The step takes only as many prompt tokens
            as should fit, judging by earlier steps, but at least a sixteenth of `max_tokens_per_mixed_step`. None: up
            to `max_tokens_per_mixed_step`.
        priority_ageing_s: seconds of waiting that are worth one level of priority. So only those requests of its tenant
            overtake a request that arrive less than (their priority - its own) * priority_ageing_s later.
        tenant_weights: tenant -> weight. Tenants that wait at the same time share the engine in proportion to their
            weights; a tenant that is not named has weight 1.
        share_prefixes_across_tenants: let tenants reuse each other's prefix blocks. A tenant can then infer from the
            latency of a prompt whether another tenant has sent it before.
    """

    max_batch_size: int = BY_DEVICE
    max_tokens_per_step: int = BY_DEVICE
    max_tokens_per_mixed_step: int = BY_DEVICE
    max_queued_requests: int = 1024
    max_queued_tokens: int = 4_000_000
    max_preemptions: int = 3
    max_unread_tokens: int = 256
    step_timeout_s: float | None = None
    max_decode_latency_ms: float | None = None
    priority_ageing_s: float = 10.0
    tenant_weights: Mapping[str, float] = field(default_factory=dict)
    share_prefixes_across_tenants: bool = False

    def resolve(self, accelerator: bool = False) -> Self:
        """A checked, frozen copy in which the device's limits replace `BY_DEVICE`.

        Token limits that are left to the device are adjusted to the limits that were set.
        """
        batch_size, step, mixed = (
            _LIMITS[name][accelerator] if getattr(self, name) == BY_DEVICE else getattr(self, name) for name in _LIMITS
        )
        for name, value in zip(_LIMITS, (batch_size, step, mixed), strict=True):
            require_int(f"scheduler_config.{name}", value, 1)
        if self.max_tokens_per_step == BY_DEVICE:
            step = max(step, batch_size)
        if self.max_tokens_per_mixed_step == BY_DEVICE:
            mixed = min(max(mixed, batch_size), step)
        # Not super(): a dataclass with slots is another class than the one that this function was defined in.
        return Settings.resolve(
            dataclasses.replace(
                self,
                max_batch_size=batch_size,
                max_tokens_per_step=step,
                max_tokens_per_mixed_step=mixed,
                tenant_weights=_frozen_mapping("scheduler_config.tenant_weights", self.tenant_weights),
            )
        )

    def _check(self) -> None:
        for name in ("max_queued_requests", "max_queued_tokens", "max_preemptions", "max_unread_tokens"):
            require_int(f"scheduler_config.{name}", getattr(self, name), 1)
        for name in ("step_timeout_s", "max_decode_latency_ms"):
            if getattr(self, name) is not None:
                require_number(f"scheduler_config.{name}", getattr(self, name), _LEAST, _MOST)
        require_number("scheduler_config.priority_ageing_s", self.priority_ageing_s, _LEAST, _MOST)
        for tenant, weight in self.tenant_weights.items():
            if not isinstance(tenant, str):
                raise requirement(ConfigError, "a tenant in scheduler_config.tenant_weights", "a string", tenant)
            require_number(f"scheduler_config.tenant_weights[{tenant!r}]", weight, _LEAST, _MOST)
        require_bool("scheduler_config.share_prefixes_across_tenants", self.share_prefixes_across_tenants)
        if self.max_tokens_per_step < self.max_batch_size:
            raise ConfigError(
                f"scheduler_config.max_tokens_per_step must be at least max_batch_size={self.max_batch_size}, "
                f"not {self.max_tokens_per_step}: each decoding request needs one token a step"
            )
        if not self.max_batch_size <= self.max_tokens_per_mixed_step <= self.max_tokens_per_step:
            raise ConfigError(
                f"scheduler_config.max_tokens_per_mixed_step must be in [max_batch_size={self.max_batch_size}, "
                f"max_tokens_per_step={self.max_tokens_per_step}], not {self.max_tokens_per_mixed_step}"
            )


@dataclass(slots=True)
class ModelConfig(Settings):
    """What to load and how to run it.

    Attributes:
        model_dir: a Hugging Face directory, a `.gguf` file or a directory with one, or a directory that `LLM.save()`
            wrote; the kind is detected.
        dtype: type of weights and activations; "auto": the checkpoint's on an accelerator, and a GGUF file's blocks as
            they are, with activations in float16. On a CPU, whose activations are always float32, "auto" means the
            fastest form of the weights that keeps their values: bfloat16 if that holds them exactly, blocks as they
            are, else float32. A type dequantizes blocks.
        device: "auto", "cpu", "cuda" or "cuda:N"; `parallel_config.devices` overrides it.
        backend: "auto", "torch" or "tensorrt".
        attention_backend: attention kernels for decodes on CUDA. "auto": our Triton kernels. "flashinfer": FlashInfer's
            (`pip install llmengine[flashinfer]`), which take half a minute to compile when a machine first needs them.
            "measure": for each number of rows the faster of the two on this GPU for the model's shapes; the result is
            kept on disk. Without FlashInfer, or for a model that it does not support, "measure" means ours.
        max_model_len: most tokens of one request, prompt and output; None: the model's context length.
        num_threads: CPU threads of the forward pass; None: torch's default.
        tuning_budget_s: most seconds that loading may spend on measuring which matrix products are fastest on this GPU
            for the model's shapes; the results are kept on disk. 0: rules of thumb instead.
        deterministic: the same prompt and parameters give bit-equal tokens and log-probabilities on this machine,
            whatever else is in the batch, and however the prompt is chunked, cached or computed again. Slower, and
            much slower on a CPU without the native decoder; on CUDA it needs the torch backend.
        load_format: "auto" reads the weights; "dummy" makes random ones from the directory's config.json alone.

    The argument `quant` names a preset (`quant_config.PRESETS`), in place of a `quant_config`: "int4-awq".
    """

    model_dir: str | Path
    parallel_config: ParallelConfig = field(default_factory=ParallelConfig)
    quant_config: QuantConfig = field(default_factory=QuantConfig)
    kv_cache_config: KvCacheConfig = field(default_factory=KvCacheConfig)
    scheduler_config: SchedulerConfig = field(default_factory=SchedulerConfig)
    dtype: DTypeChoice = "auto"
    device: str = "auto"
    backend: BackendName = "auto"
    attention_backend: AttentionBackendName = "auto"
    max_model_len: int | None = None
    num_threads: int | None = None
    tuning_budget_s: float = 1.5
    deterministic: bool = False
    load_format: Literal["auto", "dummy"] = "auto"
    quant: InitVar[PresetName | None] = None

    def __post_init__(self, quant: PresetName | None) -> None:
        if quant is None:
            return
        if self.quant_config != QuantConfig():
            raise ConfigError(
                f"quant={quant!r} excludes quant_config: use QuantConfig.preset({quant!r}) and change that"
            )
        self.quant_config = QuantConfig.preset(quant)

    def resolve(self, accelerator: bool = False) -> Self:
        """A checked, frozen copy; `accelerator` selects the limits that are left to the device."""
        scheduler, parallel, device = self.scheduler_config, self.parallel_config, self.device
        if isinstance(scheduler, SchedulerConfig):
            scheduler = scheduler.resolve(accelerator)
        if isinstance(parallel, ParallelConfig):
            parallel = parallel.resolve()
            device = parallel.devices[0] if parallel.devices else device
        copy = dataclasses.replace(self, scheduler_config=scheduler, parallel_config=parallel, device=device)
        return Settings.resolve(copy)

    def _check(self) -> None:
        if not isinstance(self.model_dir, (str, Path)) or not str(self.model_dir):
            raise requirement(ConfigError, "model_dir", "a non-empty path", self.model_dir)
        for item in dataclasses.fields(self):
            kind, value = item.default_factory, getattr(self, item.name)
            if isinstance(kind, type):
                require_kind(item.name, value, kind)
        require_choice("dtype", self.dtype, ("auto", "float32", "float16", "bfloat16"))
        require_choice("backend", self.backend, ("auto", "torch", "tensorrt"))
        require_choice("attention_backend", self.attention_backend, ("auto", "flashinfer", "measure"))
        require_choice("load_format", self.load_format, ("auto", "dummy"))
        if not isinstance(self.device, str) or not re.fullmatch(r"auto|cpu|cuda(:[0-9]+)?", self.device):
            raise requirement(ConfigError, "device", "one of 'auto', 'cpu', 'cuda', 'cuda:N'", self.device)
        if self.max_model_len is not None:
            require_int("max_model_len", self.max_model_len, 2)
        require_number("tuning_budget_s", self.tuning_budget_s, 0.0)
        if self.num_threads is not None:
            require_int("num_threads", self.num_threads, 1)
        require_bool("deterministic", self.deterministic)


def _frozen_mapping(name: str, value: Any) -> Mapping[Any, Any]:
    if not isinstance(value, Mapping):
        raise requirement(ConfigError, name, "a mapping", value)
    return MappingProxyType(dict(value))
