"""The device's work in a step, on tensors whose addresses never change, so that a CUDA graph can hold it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from llmengine.backends.cuda.buckets import Bucket, BucketSizes
from llmengine.backends.cuda.following import Finish, Inputs, RunLast, RunToLast, Sampled, Tell
from llmengine.backends.cuda.model import CudaModel
from llmengine.backends.cuda.sample_ring import SampleRing
from llmengine.backends.cuda.sampling import DeviceSampler, PendingPromptLogprobs, SamplerTensors
from llmengine.backends.cuda.step_buffer import StepBuffer, StepLimits
from llmengine.backends.cuda.stream import StepStream
from llmengine.backends.kv_layout import KvPool
from llmengine.backends.prompt_logprobs import WantedLogprobs
from llmengine.config import ModelConfig, SchedulerConfig
from llmengine.kernels.kv_blocks import KvBlocks
from llmengine.kernels.step import SlotState, end_step

_MAX_SAMPLES = 1
"""Tokens that a step samples for one row."""


class StepProgram:
    """Everything that steps run on, and the work of one step in any bucket.

    Args:
        buffers: of steps of decodes (False) and of mixed steps (True).
        tell: on rank 0 of a model that several share, tells the others what it queues besides whole steps.

    Attributes:
        kv: the blocks of all layers, see `joint_kv_layout`.
    """

    def __init__(
        self,
        model: CudaModel,
        kv: KvBlocks,
        state: SlotState,
        sampler: DeviceSampler,
        ring: SampleRing,
        buffers: Mapping[bool, StepBuffer],
        tell: Tell | None = None,
    ) -> None:
        self.model = model
        self.kv = kv
        self.state = state
        self.sampler = sampler
        self.ring = ring
        self._buffers = buffers
        self._tell = tell
        self._chosen_ids = sampler.ids.view(-1, _MAX_SAMPLES)

    @classmethod
    def allocate(
        cls, model: CudaModel, pool: KvPool, config: ModelConfig, depth: int, tell: Tell | None = None
    ) -> StepProgram:
        """Allocate the KV cache and what steps need beside it.

        Args:
            depth: steps whose arrays and results exist at once.
            tell: see `StepProgram`.
        """
        device, vocab_size = model.device, model.logits.shape[1]
        scheduler, num_slots = config.scheduler_config, config.scheduler_config.max_batch_size
        scales = pool.zeros("scales", device) if "scales" in pool.layout.tensors else None
        kv = KvBlocks(pool.zeros("kv", device), scales)
        state = SlotState.empty(num_slots, pool.max_blocks_per_request, device)
        sampler_tensors = SamplerTensors.allocate(num_slots, num_slots, vocab_size, device)
        buffers = {
            mixed: StepBuffer.allocate(limits, state, model.query_block, depth, decodes=not config.deterministic)
            for mixed, limits in _step_limits(scheduler, pool.max_blocks_per_request, model.query_block).items()
        }
        sampler = DeviceSampler(sampler_tensors, vocab_size, config.deterministic)
        ring = SampleRing.allocate(depth, num_slots, _MAX_SAMPLES, device)
        return cls(model, kv, state, sampler, ring, buffers, tell)

    def buffer(self, bucket: Bucket) -> StepBuffer:
        """The buffer that steps of a bucket are written to."""
        return self.buffer_of(bucket.mixed)

    def buffer_of(self, mixed: bool) -> StepBuffer:
        """The buffer of mixed steps, or that of steps of decodes."""
        return self._buffers[mixed]

    @property
    def is_shared(self) -> bool:
        """Whether other ranks compute each step too, so that one that is broken off breaks them all."""
        return self.model.peers is not None or self.model.link is not None

    def send(self, bucket: Bucket, ring_index: int, stream: StepStream) -> None:
        """Queue the copy of what the last `fill` of the bucket's buffer wrote."""
        buffer = self.buffer(bucket)
        if self._tell is not None:
            self._tell(Inputs(bucket.mixed, ring_index, buffer.written(ring_index)))
        buffer.send(ring_index, stream)

    def tell_sampled(self, slots: Sequence[int], token_ids: Sequence[int]) -> None:
        """Tell what a step sampled, where that does not pass from the last stage to the first."""
        assert self._tell is not None
        self._tell(Sampled(slots, token_ids))

    def run(self, bucket: Bucket) -> None:
        """Queue all device work of a step; the function that graphs are captured from."""
        self.run_last(bucket, *self.run_to_last(bucket))

    def run_with_prompt_logprobs(
        self, bucket: Bucket, wanted: Sequence[WantedLogprobs], sizes: BucketSizes
    ) -> PendingPromptLogprobs:
        """Queue a mixed step and the logits of prompt tokens; never from a graph, since there is any number of them."""
        attended, x = self._begin(bucket, samples=True)
        prompt_logprobs = self.sampler.prompt_logprobs(wanted, partial(self._last, attended, x), sizes.samples)
        if self._tell is not None:
            self._tell(Finish(bucket))
        self.run_last(bucket, attended, x)  # comes last: the sampled tokens' logits are read again after the step
        return prompt_logprobs

    def run_for_logits(self, bucket: Bucket, num_tokens: int, sizes: BucketSizes) -> Iterator[Tensor]:
        """Queue a mixed step that samples nothing, and yield the logits [n, vocab] of its first `num_tokens` tokens.

        Each tensor is overwritten when the next one is asked for.
        """
        attended, x = self._begin(bucket, samples=False)
        last = partial(self._last, attended, x)
        for used, logits in self.sampler.logits_of(range(num_tokens), last, sizes.samples):
            yield logits[:used]

    def run_sampling(self, bucket: Bucket, logits: Tensor) -> None:
        """Queue the part of a step that comes after the logits.

        Args:
            logits: fp32 [bucket.num_samples, vocab]; of a step without draws of a shard, of this rank's vocabulary.
        """
        step, peers = self._buffers[bucket.mixed].step, self.model.peers
        ids, failed = self.sampler.ids[: bucket.num_samples], self.sampler.failed[: bucket.num_samples]
        if peers is None or peers.is_first or not bucket.draws:
            self.sampler.choose(logits, step, bucket)
        if peers is not None and bucket.draws:
            peers.collectives.broadcast(ids)
        elif peers is not None:
            peers.choose(logits, step.counts, ids, failed)
        end_step(
            step, self.state, self._chosen_ids, self.sampler.failed, self.ring.token_ids, num_samples=bucket.num_samples
        )

    def compilations(self, sizes: BucketSizes) -> list[Callable[[], None]]:
        """Calls that compile what steps launch, about one kernel each, on any thread; the first one is quick.

        They queue work and leave junk; the buffers must hold steps without rows.
        """
        mixed, *decodes, _ = sizes.kernel_buckets()
        steps = {bucket: self._buffers[bucket.mixed].step for bucket in (mixed, decodes[-1])}
        model = self.model.compilations(steps, self.state, self.kv)
        calls = [*model, *self.model.tunable_segments.compilations]
        if not self.model.has_head:
            return calls
        if self.model.peers is None:
            calls.append(partial(self.run_sampling, decodes[-1], self.model.logits[: decodes[-1].num_samples]))
        if self.model.peers is None or self.model.peers.is_first:
            calls += self.sampler.compilations(self.model.logits, steps[decodes[-1]])
        return calls

    def run_to_last(self, bucket: Bucket) -> tuple[Tensor, Tensor]:
        """Queue a step up to its last attention; return what `run_last` takes."""
        return self.model.forward_to_last(self._buffers[bucket.mixed].step, self.state, self.kv, bucket)

    def run_last(self, bucket: Bucket, attended: Tensor, x: Tensor) -> None:
        """Queue the part of a step that comes after the last attention, for the tokens that sample.

        In a stage before the last, for all tokens, which the next one gets.
        """
        if not self.model.has_head:
            self.model.finish_stage(attended, x)
            return
        step = self._buffers[bucket.mixed].step
        tokens = step.sample_tokens[: bucket.num_samples] if bucket.mixed else None
        # What is simply likeliest can be found in parts; anything else needs the logits in one place.
        last = self.model.last if bucket.draws or self.model.peers is None else self.model.last_own
        self.run_sampling(bucket, last(attended, x, tokens))
        if self.model.link is not None:
            self.model.link.send_ids(step, self.state)

    def begin(self, bucket: Bucket, *, samples: bool) -> tuple[Tensor, Tensor]:
        """As `run_to_last`; in a stage before the last all of the step.

        Args:
            samples: `run_last` follows, if there is a head; else the step ends here.
        """
        begun = self.run_to_last(bucket)
        if not self.model.has_head:
            self.run_last(bucket, *begun)
        elif not samples and self.model.link is not None:
            self.model.link.send_ids(self._buffers[bucket.mixed].step, self.state)
        return begun

    def _begin(self, bucket: Bucket, *, samples: bool) -> tuple[Tensor, Tensor]:
        if self._tell is not None:
            self._tell(RunToLast(bucket, samples))
        return self.begin(bucket, samples=samples)

    def _last(self, attended: Tensor, x: Tensor, tokens: Sequence[int]) -> Tensor:
        """The logits of some of the step's tokens, see `CudaModel.last`."""
        if self._tell is not None:
            self._tell(RunLast(tokens))
        return self.model.last(attended, x, self.sampler.to_device(tokens, torch.int32))


def _step_limits(scheduler: SchedulerConfig, max_blocks: int, query_block: int) -> dict[bool, StepLimits]:
    """Sizes of the two step buffers, by `Bucket.mixed`."""
    max_tokens, max_rows = scheduler.max_tokens_per_step, scheduler.max_batch_size
    return {
        False: StepLimits(max_rows, max_rows, 0, max_rows),
        True: StepLimits(max_tokens, max_rows, max_tokens // query_block + max_rows, max_rows * (max_blocks + 1)),
    }
