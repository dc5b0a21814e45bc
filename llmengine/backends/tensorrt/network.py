"""Definitions of segments as TensorRT networks: layers of an `INetworkDefinition`, strongly typed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from llmengine.backends.tensorrt.graph import Graph, RawArray
from llmengine.backends.tensorrt.library import Library
from llmengine.backends.tensorrt.products import linear
from llmengine.backends.tensorrt.spec import SUM, SegmentKind, SegmentSpec


@dataclass(frozen=True, slots=True)
class DefinedSegment:
    """A network and the memory it points to; must live until the plan is built.

    Attributes:
        builder: the `Builder` that owns the network.
        network: the `INetworkDefinition`.
        constants: output tensor name of a constant layer -> its bytes. TensorRT does not copy them, and cannot return
            them in every dtype.
    """

    builder: Any
    network: Any
    constants: dict[str, RawArray]


def define_segment(
    library: Library, builder: Any, spec: SegmentSpec, weights: Mapping[str, RawArray] | None = None
) -> DefinedSegment:
    """The network of `spec`.

    Args:
        weights: name in the plan -> bytes, for the weights that the plan contains. They are not copied.

    Raises `EngineError` naming the call that TensorRT refused.
    """
    network = library.create_network(builder)
    network.name = spec.kind
    graph = Graph(library, network, spec, dict(weights or {}))
    outputs = _DEFINITIONS[spec.kind](graph)
    for tensor, output in zip(outputs, spec.outputs, strict=True):
        tensor.name = output.name
        network.mark_output(tensor)
    return DefinedSegment(builder, network, graph.constants)


def _first(graph: Graph) -> list[Any]:
    return [_qkv(graph, graph.inputs["x"], "")]


def _mid(graph: Graph) -> list[Any]:
    x = _after_attention(graph, graph.inputs["attended"], graph.inputs["x"])
    return [x, _qkv(graph, x, "next.")]


def _last(graph: Graph) -> list[Any]:
    rows = graph.inputs["sample_tokens"]
    attended, x = graph.gather(graph.inputs["attended"], rows), graph.gather(graph.inputs["x"], rows)
    return [_logits(graph, _after_attention(graph, attended, x))]


def _o(graph: Graph) -> list[Any]:
    return [linear(graph, graph.inputs["attended"], "o")]


def _mlp(graph: Graph) -> list[Any]:
    x = _after_sum(graph, "attention_out_norm")
    return [x, _mlp_product(graph, x)]


def _next(graph: Graph) -> list[Any]:
    x = _after_sum(graph, "mlp_out_norm")
    return [x, _qkv(graph, x, "next.")]


def _head(graph: Graph) -> list[Any]:
    return [_logits(graph, _after_sum(graph, "mlp_out_norm"))]


_DEFINITIONS: Mapping[SegmentKind, Callable[[Graph], list[Any]]] = {
    "first": _first,
    "mid": _mid,
    "last": _last,
    "o": _o,
    "mlp": _mlp,
    "next": _next,
    "head": _head,
}
"""The outputs of each kind of segment, in the order of its spec."""


def _logits(graph: Graph, x: Any) -> Any:
    """fp32 logits, scaled and soft-capped, from the hidden states after the last layer."""
    logits = graph.cast(linear(graph, _norm(graph, x, "final_norm"), "lm_head"), "float32")
    numerics = graph.spec.numerics
    if numerics.logit_scale != 1.0:
        logits = graph.multiply(logits, graph.scalar(numerics.logit_scale))
    if numerics.logit_soft_cap is not None:
        cap = numerics.logit_soft_cap
        bounded = graph.activate(graph.multiply(logits, graph.scalar(1.0 / cap)), "TANH")
        logits = graph.multiply(bounded, graph.scalar(cap))
    return logits


def _qkv(graph: Graph, x: Any, prefix: str) -> Any:
    return linear(graph, _norm(graph, x, f"{prefix}input_norm"), f"{prefix}qkv")


def _after_attention(graph: Graph, attended: Any, x: Any) -> Any:
    """Hidden states after a layer, from the output of its attention and the hidden states before it."""
    x = graph.add(x, _norm(graph, linear(graph, attended, "o"), "attention_out_norm"))
    return graph.add(x, _norm(graph, _mlp_product(graph, x), "mlp_out_norm"))


def _after_sum(graph: Graph, norm: str) -> Any:
    """Hidden states after a sum over ranks."""
    return graph.add(graph.inputs["x"], _norm(graph, graph.inputs[SUM], norm))


def _mlp_product(graph: Graph, x: Any) -> Any:
    """The product with `down`, from the hidden states before the MLP's norm."""
    gate_up = linear(graph, _norm(graph, x, "post_attention_norm"), "gate_up")
    gate, up = graph.split(gate_up, gate_up.shape[1] // 2, gate_up.shape[1] // 2)
    return linear(graph, _gated(graph, gate, up), "down")


def _gated(graph: Graph, gate: Any, up: Any) -> Any:
    """activation(gate) * up, computed in fp32 and rounded once."""
    gate = graph.cast(gate, "float32")
    if graph.spec.numerics.activation == "silu":
        activated = graph.multiply(gate, graph.activate(gate, "SIGMOID"))
    else:
        activated = graph.activate(gate, "GELU_TANH")
    return graph.cast(graph.multiply(activated, graph.cast(up, "float32")), graph.spec.dtype)


def _norm(graph: Graph, x: Any, name: str) -> Any:
    """RMSNorm of the rows, computed in fp32 and rounded once; x itself where the model has no such norm."""
    if not graph.has_weight(f"{name}.weight"):
        return x
    exact = graph.cast(x, "float32")
    mean = graph.row_mean(graph.multiply(exact, exact))
    inverse = graph.reciprocal_root(graph.add(mean, graph.scalar(graph.spec.numerics.rms_norm_eps)))
    weight = graph.cast(graph.weight(f"{name}.weight"), "float32")
    return graph.cast(graph.multiply(graph.multiply(exact, inverse), weight), graph.spec.dtype)
