"""A decoder's dense compute on CUDA by torch's functions, for models that the fused kernels cannot compute."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from llmengine.backends.cuda.fused_segments import SegmentsContext, SegmentsFactory, TunableSegments, fused_segments
from llmengine.backends.cuda.peers import Peers
from llmengine.kernels.gemm_candidates import ROW_BUCKETS, unmeasured_config
from llmengine.kernels.gemm_config import GemmShape, fixed_config
from llmengine.kernels.limits import max_shared_bytes
from llmengine.kernels.linear import LinearKernels
from llmengine.kernels.linear_ops import BoundLinear, LinearOps, compilations, product_shapes
from llmengine.kernels.norm import rms_norm
from llmengine.models.decoder import ACT_AND_MUL, DecoderLayer, Linear, Norm, TorchSegments


def build_cuda_segments(context: SegmentsContext) -> TunableSegments:
    """Fused kernels if they can compute the model, otherwise `generic_segments`."""
    return fused_segments(context) if context.arch.has_llama_segments else generic_segments(context)


def cuda_segments_factory(reason: str) -> SegmentsFactory:
    """`build_cuda_segments`, with a description that gives the reason why these segments were chosen."""

    def build(context: SegmentsContext) -> TunableSegments:
        tunable = build_cuda_segments(context)
        return replace(tunable, description=f"{tunable.description} ({reason})")

    return build


def generic_segments(context: SegmentsContext) -> TunableSegments:
    """Segments for any architecture. They allocate their results, which a graph capture keeps in its pool."""
    arch, weights = context.arch, context.weights
    # No programmatic launch, since the torch functions in between do not know of it.
    device = context.logits.device
    choose = partial(
        fixed_config if context.config.deterministic else unmeasured_config, max_shared=max_shared_bytes(device)
    )
    kernels = LinearKernels(device)
    ops = LinearOps(kernels, choose)

    def norm(name: str) -> Norm | None:
        weight = weights.norm(name)
        return None if weight is None else CudaNorm(weight, arch.rms_norm_eps)

    def linear(name: str) -> CudaLinear:
        matrix = weights.matrices[name]
        return CudaLinear(ops.norm_linear(None, 0.0, matrix, weights.bias(name)), matrix.shape[0])

    def summed(name: str) -> Linear:
        return linear(name) if context.peers is None else SummedLinear(linear(name), context.peers)

    def layer(prefix: str) -> DecoderLayer:
        return DecoderLayer(
            qkv=linear(prefix + "qkv"),
            o=summed(prefix + "o"),
            gate_up=linear(prefix + "gate_up"),
            down=summed(prefix + "down"),
            input_norm=norm(prefix + "input_norm"),
            attention_out_norm=norm(prefix + "attention_out_norm"),
            post_attention_norm=norm(prefix + "post_attention_norm"),
            mlp_out_norm=norm(prefix + "mlp_out_norm"),
        )

    layers = [layer(f"layers.{index}.") for index in range(arch.num_layers)]
    act_and_mul = ACT_AND_MUL[arch.hidden_act]
    head = weights.matrices.get("lm_head")
    if head is None:
        segments = TorchSegments(layers, _unchanged, _unchanged, act_and_mul, logit_scale=1.0, logit_soft_cap=None)
    else:
        segments = TorchSegments(
            layers,
            final_norm=CudaNorm(weights.by_name["final_norm.weight"], arch.rms_norm_eps),
            lm_head=CudaLinear(ops.norm_linear(None, 0.0, head), head.shape[0], context.logits),
            act_and_mul=act_and_mul,
            logit_scale=arch.logit_scale,
            logit_soft_cap=arch.logit_soft_cap,
        )
    products = "Triton and cuBLASLt products" if weights.quantized else "cuBLASLt"
    if context.config.deterministic:
        products = "Triton products of a fixed order"
    return TunableSegments(
        segments, f"{products} and torch functions", compilations=compilations(kernels, _shapes(context), choose)
    )


def _shapes(context: SegmentsContext) -> Iterator[GemmShape]:
    """Yield the products of steps of every size."""
    scheduler, logits = context.config.scheduler_config, context.logits
    for name, matrix in context.weights.matrices.items():
        is_head = name == "lm_head"
        most = scheduler.max_batch_size if is_head else scheduler.max_tokens_per_step
        dtype = context.weights.dtype
        for rows in ROW_BUCKETS if name != "embed_tokens" else ():
            if rows < 2 * most:
                yield from product_shapes("norm_linear", rows, matrix, dtype, logits.dtype if is_head else dtype)


def _unchanged(x: Tensor, residual: Tensor | None = None) -> Tensor:
    """The norm and the output matrix of a stage that has neither."""
    assert residual is None
    return x


@dataclass(frozen=True, slots=True)
class CudaNorm:
    """`models.decoder.Norm`; the weight may have another dtype than x."""

    weight: Tensor
    eps: float

    def __call__(self, x: Tensor) -> Tensor:
        """Normalise x [num_tokens, hidden] into a new tensor."""
        normed = torch.empty_like(x)
        rms_norm(x, self.weight, self.eps, normed)
        return normed


@dataclass(frozen=True, slots=True)
class CudaLinear:
    """`models.decoder.Linear`.

    Attributes:
        product: the weight, bound.
        out_features: columns of the result.
        out: tensor that results are written to; None for new tensors of the input's dtype.
    """

    product: BoundLinear
    out_features: int
    out: Tensor | None = None

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """The product, [num_tokens, out_features], plus the residual if there is one."""
        y = x.new_empty(len(x), self.out_features) if self.out is None else self.out[: len(x)]
        self.product(x, y)
        return y if residual is None else y.add_(residual)


@dataclass(frozen=True, slots=True)
class SummedLinear:
    """`models.decoder.Linear` whose inputs are shared out among ranks: the sum of all ranks' results."""

    own: CudaLinear
    peers: Peers

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """The sum, plus the residual, the same on all ranks, if there is one."""
        y = self.own(x, residual if self.peers.is_first else None)
        self.peers.collectives.all_reduce(y)
        return y


def head_norm(weight: Tensor, eps: float) -> Callable[[Tensor], None]:
    """Norm of q or k over all heads, [num_tokens, len(weight)], in place."""

    def apply(x: Tensor) -> None:
        normed = x.contiguous()
        rms_norm(normed, weight, eps, normed)
        x.copy_(normed)

    return apply
