"""A dense decoder on CUDA: weights on the device, paged attention, one forward pass for any bucket."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from llmengine.backends.cuda.attention_choice import DecodeChoice, choose_decode, decode_step
from llmengine.backends.cuda.buckets import Bucket
from llmengine.backends.cuda.fused_segments import SegmentsContext, SegmentsFactory, TunableSegments
from llmengine.backends.cuda.generic_segments import head_norm
from llmengine.backends.cuda.peers import Peers
from llmengine.backends.cuda.stage_link import StageLink
from llmengine.backends.cuda.weights import CudaWeights
from llmengine.config import ModelConfig, SchedulerConfig
from llmengine.kernels.attention import AttentionConfig
from llmengine.kernels.attention_decode import AttentionWorkspace, attention_workspace, decode_attention
from llmengine.kernels.attention_prefill import prefill_attention, query_block_size, rope_and_write
from llmengine.kernels.embedding import look_up
from llmengine.kernels.flashinfer_attention import FlashInferDecode
from llmengine.kernels.kv_blocks import KvBlocks
from llmengine.kernels.limits import has_pdl
from llmengine.kernels.quantized_matrix import QuantizedMatrix
from llmengine.kernels.step import DeviceStep, SlotState, begin_step
from llmengine.kernels.timing import time_graph
from llmengine.models.arch import ModelArch
from llmengine.models.decoder import Attend, forward_to_last
from llmengine.models.rope import layer_tables


@dataclass(frozen=True, slots=True)
class LayerAttention:
    """What differs between the attentions of layers; see `kernels.attention`.

    Attributes:
        projection_norms: normalise all of q and all of k in place, before the kernels run.
    """

    config: AttentionConfig
    rope_table: Tensor
    q_norm: Tensor | None
    k_norm: Tensor | None
    projection_norms: tuple[Callable[[Tensor], None], ...]


@dataclass(frozen=True, slots=True)
class Activations:
    """Buffers of the largest step, at fixed addresses.

    Attributes:
        hidden: [max_tokens_per_step, hidden].
        attended: [max_tokens_per_step, num_heads * head_dim].
        workspace: scratch of the decode attention.
        logits: fp32 [max_batch_size, vocab]; without rows in a stage that is not the last.
    """

    hidden: Tensor
    attended: Tensor
    workspace: AttentionWorkspace
    logits: Tensor

    @staticmethod
    def allocate(
        arch: ModelArch,
        scheduler: SchedulerConfig,
        attention: AttentionConfig,
        dtype: torch.dtype,
        device: torch.device,
    ) -> Activations:
        """Allocate buffers for steps of a scheduler's limits."""
        max_tokens, max_rows = scheduler.max_tokens_per_step, scheduler.max_batch_size
        return Activations(
            hidden=torch.zeros((max_tokens, arch.hidden_size), dtype=dtype, device=device),
            attended=torch.zeros((max_tokens, arch.num_heads * arch.head_dim), dtype=dtype, device=device),
            workspace=attention_workspace(attention, _num_sms(device), device),
            logits=torch.zeros((max_rows if arch.has_head else 0, arch.vocab_size), dtype=torch.float32, device=device),
        )


def build_cuda_model(
    arch: ModelArch,
    weights: CudaWeights,
    config: ModelConfig,
    limit: int,
    segments_factory: SegmentsFactory,
    peers: Peers | None = None,
    link: StageLink | None = None,
) -> CudaModel:
    """Build a model on weights that are in their places but perhaps not filled yet.

    Args:
        limit: most tokens of a request.
        peers: if the model is a shard, the ranks that have the others.
        link: if it is a stage, its place among the others.

    Raises what `segments_factory` does, and `ConfigError` if FlashInfer was asked for by name and cannot be used.
    """
    device, dtype = weights.device, weights.dtype
    layers = _attention_layers(arch, weights, config.kv_cache_config.block_size, limit, peers)
    activations = Activations.allocate(arch, config.scheduler_config, layers[0].config, dtype, device)
    pdl = has_pdl(device)
    segments = segments_factory(SegmentsContext(arch, weights, config, activations.logits, pdl, peers))
    attentions = [layer.config for layer in layers]
    decode_choice = choose_decode(config, attentions, dtype, limit, device, _num_sms(device))
    has_decodes = not config.deterministic
    return CudaModel(
        arch, weights, layers, activations, segments, decode_choice, peers, link, pdl=pdl, has_decodes=has_decodes
    )


class CudaModel:
    """A decoder's weights, its forward pass for any bucket, and the buffers of the largest step.

    Args:
        peers: if the model is a shard, the ranks that have the others.
        link: if it is a stage, its place among the others.
        pdl: kernels may start before those ahead of them have ended.
        has_decodes: rows of one token are attended to by the decode kernel; otherwise as chunks of one token.

    Attributes:
        dtype: of the activations.
        device: of everything.
        logits: fp32 [max_batch_size, vocab], the last step's; at a fixed address. On ranks other than 0 of a model
            that several share, those of the rank's rows of the vocabulary; without rows in a stage that is not the
            last.
        peers, link: see above.
        query_block: query tokens of a program of the prefill attention.
        tunable_segments: what computes between the attentions.
    """

    def __init__(
        self,
        arch: ModelArch,
        weights: CudaWeights,
        layers: Sequence[LayerAttention],
        activations: Activations,
        tunable_segments: TunableSegments,
        decode_choice: DecodeChoice,
        peers: Peers | None = None,
        link: StageLink | None = None,
        *,
        pdl: bool,
        has_decodes: bool,
    ) -> None:
        self.weights = weights
        self.dtype, self.device = weights.dtype, weights.device
        self.peers = peers
        self.link = link
        self.logits = activations.logits
        if peers is not None and peers.is_first and arch.has_head:
            self.logits = self.logits.new_zeros(len(self.logits), peers.vocab_size)
        self.query_block = query_block_size(layers[0].config, self.dtype)
        self.tunable_segments = tunable_segments
        self._segments = tunable_segments.segments
        self._arch = arch
        self._layers = layers
        self._activations = activations
        self._decode_choice = decode_choice
        self._pdl = pdl
        self._has_decodes = has_decodes

    @property
    def has_head(self) -> bool:
        """Whether steps end with logits: the model is not a stage before the last."""
        return self._arch.has_head

    def forward_to_last(
        self, step: DeviceStep, state: SlotState, kv: KvBlocks, bucket: Bucket
    ) -> tuple[Tensor, Tensor]:
        """Run a step up to the last attention; return what `last` takes, [bucket.num_tokens, ...] each.

        Writes the KV of all tokens. A CUDA graph can hold this and `last`: neither looks at a value, and segments that
        allocate do so through torch.

        Args:
            kv: the blocks of all layers.
        """
        x = self._activations.hidden[: bucket.num_tokens]
        if self.link is not None and self._arch.has_embedding:
            self.link.take_ids(step, state)
        self._embed(step, state, x)
        if self.link is not None and not self._arch.has_embedding:
            self.link.take_hidden(x)
        elif self._arch.embedding_scale != 1.0:
            x.mul_(self._arch.embedding_scale)
        num_rows = min(bucket.num_tokens, len(step.row_slots))
        flashinfer = self._decode_choice.of(num_rows)
        if flashinfer is not None:
            flashinfer.begin(step, num_rows)
        return forward_to_last(self._segments, x, self._attend(step, kv, bucket, flashinfer))

    def _embed(self, step: DeviceStep, state: SlotState, x: Tensor) -> None:
        """Begin a step and write the embeddings of its tokens to x [num_tokens, hidden], not multiplied yet.

        A stage without an embedding only begins the step.
        """
        if not self._arch.has_embedding:
            begin_step(step, state, None, x)
            return
        embedding = self.weights.matrices["embed_tokens"]
        if self.peers is not None:
            begin_step(step, state, None, x)
            self.peers.embed(embedding, step.token_ids[: len(x)], x)
        elif isinstance(embedding, QuantizedMatrix):
            begin_step(step, state, None, x)
            look_up(embedding, step.token_ids[: len(x)], x)
        else:
            begin_step(step, state, embedding.weight, x)

    def last(self, attended: Tensor, x: Tensor, tokens: Tensor | None) -> Tensor:
        """Compute fp32 logits [len(tokens), vocab] of some of the step's tokens, at the address of `logits`.

        On ranks other than 0 of a model that several share, the result is those of the rank's rows of the vocabulary.

        Args:
            attended: as `forward_to_last` returns it; overwritten, like x, if `tokens` is None.
            tokens: int32, at most max_batch_size of them; None: all of the step, in order.
        """
        logits = self.last_own(attended, x, tokens)
        if self.peers is None:
            return logits
        whole = self.logits[: len(logits)]
        self.peers.gather_logits(logits, whole)
        return whole

    def finish_stage(self, attended: Tensor, x: Tensor) -> None:
        """End a step in a stage before the last: the next one gets the hidden states of all tokens."""
        assert self.link is not None
        self.link.send_hidden(self._segments.last(attended, x, None))

    def last_own(self, attended: Tensor, x: Tensor, tokens: Tensor | None) -> Tensor:
        """As `last`, but on all ranks of a model that several share those of the rank's rows of the vocabulary."""
        return self._segments.last(attended, x, tokens)

    def compilations(
        self, steps: Mapping[Bucket, DeviceStep], state: SlotState, kv: KvBlocks
    ) -> list[Callable[[], None]]:
        """Calls that compile the kernels around the segments, about one kernel each; their results are junk.

        Args:
            steps: a step without rows for each kind of bucket, mixed or not.
        """
        calls: dict[Hashable, Callable[[], None]] = {}
        kinds = {layer.config: index for index, layer in enumerate(self._layers)}
        for bucket, step in steps.items():
            x = self._activations.hidden[: bucket.num_tokens]
            calls[begin_step] = partial(self._embed, step, state, x)
            qkv = x.new_zeros((bucket.num_tokens, self._qkv_width))
            for config, layer in kinds.items():
                for launch in self._attention(layer, qkv, step, kv, bucket, None):
                    # Decodes attend by the same kernel in steps of both kinds.
                    calls[config, launch.func] = launch
        return list(calls.values())

    @property
    def _qkv_width(self) -> int:
        return (self._arch.num_heads + 2 * self._arch.num_kv_heads) * self._arch.head_dim

    @property
    def description(self) -> str:
        """Name of what computes, for people."""
        return ", ".join(filter(None, (self.tunable_segments.description, self._decode_choice.description)))

    def tune_attention(self, state: SlotState, kv: KvBlocks) -> None:
        """Measure which kernel attends for decodes, if that was asked for. No graph may exist. Writes junk to `kv`."""

        def time_us(num_rows: int, flashinfer: FlashInferDecode | None) -> float:
            step = decode_step(num_rows, state.block_tables, kv.numbers.shape[1], self._layers[0].config.block_size)
            attend = self._attend(step, kv, Bucket(num_rows, num_rows, mixed=False), flashinfer)
            qkv = torch.randn((num_rows, self._qkv_width), device=kv.device).to(self.dtype)

            def run() -> None:
                if flashinfer is not None:
                    flashinfer.begin(step, num_rows)
                for layer in range(len(self._layers)):
                    attend(layer, qkv)

            return time_graph([run])

        self._decode_choice.measure(time_us)

    def _attend(self, step: DeviceStep, kv: KvBlocks, bucket: Bucket, flashinfer: FlashInferDecode | None) -> Attend:
        def attend(layer: int, qkv: Tensor) -> Tensor:
            for launch in self._attention(layer, qkv, step, kv, bucket, flashinfer):
                launch()
            return self._activations.attended[: bucket.num_tokens]

        return attend

    def _attention(
        self,
        layer: int,
        qkv: Tensor,
        step: DeviceStep,
        kv: KvBlocks,
        bucket: Bucket,
        flashinfer: FlashInferDecode | None,
    ) -> Iterator[partial[None]]:
        """Yield the launches of a layer's attention, whose result is in `Activations.attended`."""
        arch, attended, pdl = self._arch, self._activations.attended[: bucket.num_tokens], self._pdl
        own = self._layers[layer]
        q_size, kv_size = arch.num_heads * arch.head_dim, arch.num_kv_heads * arch.head_dim
        for norm, part in zip(own.projection_norms, qkv.split((q_size, kv_size, kv_size), dim=1), strict=False):
            yield partial(norm, part)
        norms, eps = (own.q_norm, own.k_norm), arch.rms_norm_eps
        blocks = kv.layer(layer)
        shared = (step, qkv, blocks, own.rope_table, own.config)
        if flashinfer is not None:
            yield partial(flashinfer.attend, *shared, attended, *norms, eps, pdl=pdl)
        elif bucket.mixed:
            yield partial(rope_and_write, *shared, *norms, eps, pdl=pdl)
        if bucket.mixed:
            yield partial(prefill_attention, step, qkv, blocks, own.config, attended, pdl=pdl)
        if flashinfer is None and self._has_decodes:
            yield partial(decode_attention, *shared, attended, self._activations.workspace, *norms, eps, pdl=pdl)


def _attention_layers(
    arch: ModelArch, weights: CudaWeights, block_size: int, limit: int, peers: Peers | None
) -> list[LayerAttention]:
    device = weights.device
    on_host = layer_tables(arch, limit)
    tables = {id(table): table.to(device) for table in on_host}
    layers = []
    for index, table in enumerate(on_host):
        window = arch.layer(index).sliding_window or limit
        config = AttentionConfig(
            arch.num_heads,
            arch.num_kv_heads,
            arch.head_dim,
            block_size,
            scale=arch.score_scale,
            sliding_window=window if window < limit else 0,
            soft_cap=arch.attention_soft_cap or 0.0,
        )
        q_norm, k_norm = (weights.norm(f"layers.{index}.{name}_norm") for name in ("q", "k"))
        projection_norms: tuple[Callable[[Tensor], None], ...] = ()
        if arch.qk_norm == "projection" and q_norm is not None and k_norm is not None:
            eps = arch.rms_norm_eps
            own = (head_norm(q_norm, eps), head_norm(k_norm, eps))
            projection_norms = own if peers is None else peers.head_norms(q_norm, k_norm, eps)
            q_norm = k_norm = None
        layers.append(LayerAttention(config, tables[id(table)], q_norm, k_norm, projection_norms))
    return layers


def _num_sms(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4
