"""A decoder's dense compute on CUDA: fused kernels, with activations at fixed addresses so that graphs can hold it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
import triton
from torch import Tensor

from llmengine.backends.cuda.compile_threads import compile_threads
from llmengine.backends.cuda.peers import Peers
from llmengine.backends.cuda.weights import CudaWeights
from llmengine.config import ModelConfig, SchedulerConfig
from llmengine.kernels.activation import silu_and_mul
from llmengine.kernels.gemm_candidates import ROW_BUCKETS, unmeasured_config
from llmengine.kernels.gemm_choice import GemmChoices, cuda_choices
from llmengine.kernels.gemm_config import GemmShape, LinearConfig, Operation, fixed_config
from llmengine.kernels.limits import max_shared_bytes
from llmengine.kernels.linear import LinearKernels
from llmengine.kernels.linear_ops import (
    BoundLinear,
    BoundMlp,
    DeviceMatrix,
    LinearOps,
    compile_product,
    has_kernel,
    product_shapes,
)
from llmengine.kernels.norm import rms_norm
from llmengine.kernels.peer_sum import RowNorm
from llmengine.kernels.scaled_weights import ScaledMatrix
from llmengine.kernels.timing import time_graph
from llmengine.models.arch import ModelArch
from llmengine.models.decoder import Segments, finish_logits

_OPERATIONS: dict[str, Operation] = {
    "qkv": "norm_linear",
    "o": "linear_add",
    "gate_up": "norm_linear_silu",
    "down": "linear_add",
}
"""A layer's matrices, and the operation that each is used in."""

_OF_SUMS: Mapping[Operation, Operation] = {
    "norm_linear": "linear",
    "linear_add": "linear",
    "norm_linear_silu": "linear_silu",
}
"""The operations of a shard, where sums over ranks also add and normalize."""

_COLD_BYTES = 160 << 20
"""Weights that a measurement reads before it reads one again; three times an H100's L2."""


@dataclass(frozen=True, slots=True)
class _Layer:
    """One layer's products with their weights bound: (input, where the result goes), of `mlp` see `LinearOps.mlp`.

    Attributes:
        input_norm, mlp_norm: of a shard, the norms before `qkv` and `mlp` where a sum does them.
    """

    qkv: BoundLinear
    o: BoundLinear
    mlp: BoundMlp
    input_norm: RowNorm | None = None
    mlp_norm: RowNorm | None = None


@dataclass(frozen=True, slots=True)
class SegmentsContext:
    """Everything that segments are built from.

    Attributes:
        weights: in their places on the device but perhaps not filled yet.
        logits: fp32 [max_batch_size, vocab], to which `last` writes; without rows in a stage that is not the last.
        pdl: kernels may start before those ahead of them have ended.
        peers: if the model is a shard: the results of `o` and `down` are summed over the ranks.
    """

    arch: ModelArch
    weights: CudaWeights
    config: ModelConfig
    logits: Tensor
    pdl: bool
    peers: Peers | None = None


def _no_tuning(_: float) -> None:
    """Leave everything as it is."""


@dataclass(frozen=True, slots=True)
class TunableSegments:
    """Segments, the dense compute between attentions, with what prepares them.

    Attributes:
        description: name of what computes, for people.
        tune: chooses the fastest kernels by measuring them on the weights in their places, within about the given
            seconds. Called once, before any graph exists.
        compilations: calls that compile what the first steps run, each on any thread. They may launch kernels, whose
            results are junk.
        has_loaded_weights: the weights are in their places already, because choosing these segments needed them.
    """

    segments: Segments
    description: str
    tune: Callable[[float], None] = _no_tuning
    compilations: Sequence[Callable[[], None]] = ()
    has_loaded_weights: bool = False


SegmentsFactory = Callable[[SegmentsContext], TunableSegments]


def fused_segments(context: SegmentsContext) -> TunableSegments:
    """Segments of Triton kernels and cuBLASLt products, for models with `has_llama_segments`."""
    assert context.arch.has_llama_segments, context.arch.architecture
    config = context.config
    fused = FusedSegments(
        context.arch,
        context.weights,
        config.scheduler_config,
        context.logits,
        context.pdl,
        config.deterministic,
        context.peers,
    )
    return TunableSegments(fused, "Triton", fused.tune, fused.compilations(will_tune=config.tuning_budget_s > 0))


class FusedSegments:
    """`models.decoder.Segments`; nothing in it allocates or looks at a value.

    Args:
        logits: fp32 [max_batch_size, vocab], where `last` leaves its result.
        pdl: kernels may start before those ahead of them have ended.
        deterministic: a token's result does not depend on the tokens beside it, to the last bit.
        peers: see `SegmentsContext`.
    """

    def __init__(
        self,
        arch: ModelArch,
        weights: CudaWeights,
        scheduler: SchedulerConfig,
        logits: Tensor,
        pdl: bool,
        deterministic: bool = False,
        peers: Peers | None = None,
    ) -> None:
        max_tokens, max_rows = scheduler.max_tokens_per_step, scheduler.max_batch_size
        self._device, dtype = weights.device, weights.dtype

        def buffer(rows: int, columns: int) -> Tensor:
            return torch.zeros((rows, columns), dtype=dtype, device=self._device)

        q_size = arch.num_heads * arch.head_dim
        self._qkv = buffer(max_tokens, q_size + 2 * arch.num_kv_heads * arch.head_dim)
        self._inner = buffer(max_tokens, arch.intermediate_size)
        self._sampled_attended = buffer(max_rows, q_size)
        self._sampled_x = buffer(max_rows, arch.hidden_size)
        self._logits = logits
        self._logit_scale, self._logit_soft_cap = arch.logit_scale, arch.logit_soft_cap
        self._kernels = LinearKernels(self._device, pdl=pdl)
        self._choices = None if deterministic else _choices_of(self._kernels, self._device)
        untuned = partial(
            fixed_config if deterministic else unmeasured_config, max_shared=max_shared_bytes(self._device)
        )
        self._choose = untuned if self._choices is None else self._choices.choose
        self._peers = peers
        # Of a shard: what this rank adds to a sum, and the norm of what the sum was added to.
        self._part = None if peers is None else buffer(max_tokens, arch.hidden_size)
        self._normed = None if peers is None else buffer(max_tokens, arch.hidden_size)
        self._head = weights.matrices.get("lm_head")  # None in a stage that is not the last
        self._eps = arch.rms_norm_eps
        self._any_norm = weights.by_name["layers.0.input_norm.weight"]
        ops = LinearOps(self._kernels, self._choose)
        self._layers = [self._bind_layer(ops, weights, f"layers.{index}.") for index in range(arch.num_layers)]
        self._last_norm: RowNorm | None = None
        self._lm_head: BoundLinear | None = None
        if self._head is not None:
            final_norm = weights.by_name["final_norm.weight"]
            self._last_norm = self._norm_of_sum(final_norm, self._head)
            self._lm_head = self._bind_normed(ops, final_norm, self._head, None)
        self._layer_matrices = [self._matrices(weights, f"layers.{index}.") for index in range(arch.num_layers)]
        self._dtype = dtype

    @property
    def num_layers(self) -> int:
        return len(self._layers)

    def compilations(self, will_tune: bool = False) -> list[Callable[[], None]]:
        """Calls that compile the products of steps of every size, about one kernel each.

        Args:
            will_tune: also compile what `tune` measures first, whose time is better spent on measuring.
        """
        x, inner = self._sampled_x, self._inner[: len(self._sampled_x)]

        def run_row_kernels() -> None:
            self._kernels.normed(x, self._any_norm, self._eps)
            silu_and_mul(inner.new_zeros(len(inner), 2 * inner.shape[1]), inner, self._kernels.pdl)

        products: dict[tuple[GemmShape, LinearConfig], Callable[[], None]] = {}
        for rows in self._row_buckets():
            for shape in self._shapes(rows):
                configs = [self._choose(shape)]
                choices = self._choices if will_tune and rows == ROW_BUCKETS[0] else None
                if choices is not None and choices.missing([shape]):
                    configs += choices.candidates(shape)
                for config in configs:
                    if has_kernel(shape, config):  # one for any number of rows
                        products[replace(shape, num_rows=0), config] = partial(self._compile, shape, config)
        return [run_row_kernels, *products.values()]

    def tune(self, budget_s: float) -> None:
        """Measure which products are fastest for the model's shapes, those of the smallest steps first."""
        deadline = time.monotonic() + budget_s
        for rows in self._row_buckets():
            if self._choices is None or time.monotonic() >= deadline:
                return
            shapes = self._choices.missing(self._shapes(rows))
            self._compile_candidates(self._choices, shapes, deadline)
            if self._choices.measure(shapes, deadline - time.monotonic(), self._time_us):
                return

    def _row_buckets(self) -> list[int]:
        """The buckets that steps fall in."""
        return [rows for rows in ROW_BUCKETS if rows < 2 * len(self._qkv)]

    def _shapes(self, num_rows: int) -> list[GemmShape]:
        """Products of a step of `num_rows` tokens, each once, in the order of their use."""
        layers = range(len(self._layers))
        shapes = dict.fromkeys(shape for layer in layers for shape in self._shapes_of_layer(layer, num_rows))
        if self._head is not None and num_rows < 2 * len(self._logits):
            operation = self._operation("norm_linear", self._head)
            shapes |= dict.fromkeys(product_shapes(operation, num_rows, self._head, self._dtype, torch.float32))
        return list(shapes)

    def _shapes_of_layer(self, layer: int, num_rows: int) -> list[GemmShape]:
        return [
            shape
            for operation, matrix in self._layer_matrices[layer]
            for shape in product_shapes(operation, num_rows, matrix, self._dtype, self._dtype)
        ]

    def _compile_candidates(self, choices: GemmChoices, shapes: Sequence[GemmShape], deadline: float) -> None:
        """Compile the candidates that will be timed, on threads; none is started after the deadline."""

        def compile_in_time(shape: GemmShape, config: LinearConfig) -> None:
            if time.monotonic() < deadline:
                self._compile(shape, config)

        with compile_threads() as threads:
            jobs = [
                threads.submit(compile_in_time, shape, config)
                for shape in shapes
                for config in choices.candidates(shape)
                if has_kernel(shape, config)
            ]
        for job in jobs:
            job.result()

    def _compile(self, shape: GemmShape, config: LinearConfig) -> None:
        with torch.cuda.device(self._device):
            compile_product(self._kernels, shape, config)

    def _time_us(self, shape: GemmShape) -> float:
        """Microseconds of the products of a few layers (all, if the model is small), or of one layer and the LM head.

        The layers are among those that have the shape. If it has more rows than the largest step, that step is timed.
        """
        is_head = self._head is not None and (shape.n, shape.k) == self._head.shape
        num_rows = min(shape.num_rows, len(self._logits) if is_head else len(self._qkv))
        layers = [layer for layer in range(len(self._layers)) if shape in self._shapes_of_layer(layer, shape.num_rows)]
        layer_bytes = sum(matrix.size_bytes for _, matrix in self._layer_matrices[(layers or [0])[0]])
        layers = [0] if is_head else layers[: max(2, -(-_COLD_BYTES // layer_bytes))]
        x, attended = (
            torch.randn((num_rows, columns), dtype=self._dtype, device=self._device)
            for columns in (self._sampled_x.shape[1], self._sampled_attended.shape[1])
        )

        def run() -> None:
            for layer in layers:
                self._layers[layer].qkv(x, self._qkv[:num_rows])
                self._layers[layer].o(attended, x)
                self._layers[layer].mlp(x, self._inner[:num_rows], x)
            if is_head and self._lm_head is not None:
                self._lm_head(x, self._logits[:num_rows])

        try:
            return time_graph([run])
        except triton.runtime.errors.OutOfResources:
            return float("inf")

    def first(self, x: Tensor) -> Tensor:
        norm, qkv = self._layers[0].input_norm, self._qkv[: len(x)]
        if norm is not None:
            rms_norm(x, norm.weight, norm.eps, norm.out[: len(x)], self._kernels.pdl)
        self._layers[0].qkv(_input(x, norm), qkv)
        return qkv

    def mid(self, layer: int, attended: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        following = self._layers[layer + 1]
        self._finish(layer, attended, x, following.input_norm)
        qkv = self._qkv[: len(x)]
        following.qkv(_input(x, following.input_norm), qkv)
        return x, qkv

    def last(self, attended: Tensor, x: Tensor, sample_tokens: Tensor | None) -> Tensor:
        if self._lm_head is None:
            assert sample_tokens is None, "the next stage wants all tokens"
            self._finish(len(self._layers) - 1, attended, x, None)
            return x
        if sample_tokens is not None:
            num_samples = len(sample_tokens)
            attended = torch.index_select(attended, 0, sample_tokens, out=self._sampled_attended[:num_samples])
            x = torch.index_select(x, 0, sample_tokens, out=self._sampled_x[:num_samples])
        self._finish(len(self._layers) - 1, attended, x, self._last_norm)
        logits = self._logits[: len(x)]
        self._lm_head(_input(x, self._last_norm), logits)
        finish_logits(logits, self._logit_scale, self._logit_soft_cap)
        return logits

    def _finish(self, layer: int, attended: Tensor, x: Tensor, norm: RowNorm | None) -> None:
        """Add to x what comes after the layer's attention; a shard also writes the norm that follows, if any."""
        own, inner = self._layers[layer], self._inner[: len(x)]
        if self._peers is None or self._part is None:
            own.o(attended, x)
            own.mlp(x, inner, x)
            return
        part = self._part[: len(x)]
        own.o(attended, part)
        self._add_sum(part, x, own.mlp_norm)
        own.mlp(_input(x, own.mlp_norm), inner, part)
        self._add_sum(part, x, norm)

    def _add_sum(self, part: Tensor, x: Tensor, norm: RowNorm | None) -> None:
        assert self._peers is not None
        self._peers.collectives.add_sum(part, x, None if norm is None else norm.of(len(x)))

    def _bind_layer(self, ops: LinearOps, weights: CudaWeights, prefix: str) -> _Layer:
        def bound(name: str) -> tuple[DeviceMatrix, Tensor | None]:
            return weights.matrices[prefix + name], weights.bias(prefix + name)

        input_norm, mlp_norm = weights.norm(prefix + "input_norm"), weights.norm(prefix + "post_attention_norm")
        assert input_norm is not None
        assert mlp_norm is not None
        (gate_up, gate_up_bias), (down, down_bias) = bound("gate_up"), bound("down")
        norm_of_sum = self._norm_of_sum(mlp_norm, gate_up)
        return _Layer(
            qkv=self._bind_normed(ops, input_norm, *bound("qkv")),
            o=ops.linear_add(*bound("o")) if self._peers is None else ops.linear(*bound("o")),
            mlp=ops.mlp(
                mlp_norm if norm_of_sum is None else None,
                self._eps,
                gate_up,
                down,
                gate_up_bias,
                down_bias,
                accumulate=self._peers is None,
            ),
            input_norm=self._norm_of_sum(input_norm, weights.matrices[prefix + "qkv"]),
            mlp_norm=norm_of_sum,
        )

    def _matrices(self, weights: CudaWeights, prefix: str) -> list[tuple[Operation, DeviceMatrix]]:
        """A layer's matrices, and what each is used in."""
        found = ((kind, weights.matrices[prefix + name]) for name, kind in _OPERATIONS.items())
        return [(self._operation(kind, matrix), matrix) for kind, matrix in found]

    def _bind_normed(self, ops: LinearOps, norm: Tensor, matrix: DeviceMatrix, bias: Tensor | None) -> BoundLinear:
        """The product of normalized rows, which a shard gets normalized already unless the product rounds them too."""
        if self._norm_of_sum(norm, matrix) is None:
            return ops.norm_linear(norm, self._eps, matrix, bias)
        return ops.linear(matrix, bias)

    def _norm_of_sum(self, weight: Tensor, matrix: DeviceMatrix) -> RowNorm | None:
        """The norm before a matrix, where the sum over ranks before it does it."""
        if self._normed is None or isinstance(matrix, ScaledMatrix):
            return None
        return RowNorm(weight, self._eps, self._normed)

    def _operation(self, kind: Operation, matrix: DeviceMatrix) -> Operation:
        """What a matrix is used in, where it would be `kind` in a model that is no shard."""
        if self._peers is None or (isinstance(matrix, ScaledMatrix) and kind != "linear_add"):
            return kind
        return _OF_SUMS[kind]


def _input(x: Tensor, norm: RowNorm | None) -> Tensor:
    """What a product reads: x, or its norm where that is there already."""
    return x if norm is None else norm.out[: len(x)]


def _choices_of(kernels: LinearKernels, device: torch.device) -> GemmChoices | None:
    return cuda_choices(kernels, device) if device.type == "cuda" else None
