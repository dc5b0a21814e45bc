"""Sampling parameters of every slot on the device, the choice of tokens in a step, log-probabilities after it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llmengine.backends.torch.cuda_step import Bucket
from llmengine.batch import BatchRow, SlotInit, TokenLogprobs
from llmengine.kernels.sampling import (
    SlotParams,
    forbid_stops,
    sample,
    sample_greedy,
    sampling_workspace,
)
from llmengine.kernels.step import DeviceStep

_STOP_IDS = 16
"""Stop tokens that a slot has room for at first."""


@dataclass(frozen=True, slots=True)
class PendingLogprobs:
    """Log-probabilities on their way to the host, valid when the step's event has passed.

    Attributes:
        rows: rows of logits that want them, with the slot and the number of alternatives.
        values: fp32 [len(rows), 1 + alternatives], pinned: the chosen token's, then the likeliest.
        ids: int64 [len(rows), alternatives], pinned.
    """

    rows: Sequence[tuple[int, int, int]]
    values: Tensor
    ids: Tensor

    def collect(self) -> dict[int, TokenLogprobs]:
        """Return slot -> log-probabilities."""
        values, ids = self.values.tolist(), self.ids.tolist()
        return {
            slot: TokenLogprobs(line[0], tuple(top[:count]), tuple(line[1 : count + 1]))
            for (_, slot, count), line, top in zip(self.rows, values, ids, strict=True)
        }


class DeviceSampler:
    """Chooses tokens inside a step. Greedy steps read no parameters; `draws` says which steps are not."""

    def __init__(self, num_slots: int, max_rows: int, vocab_size: int, device: torch.device) -> None:
        self._vocab_size = vocab_size
        self._device = device
        self._num_logprobs: dict[int, int] = {}
        self._special: set[int] = set()
        self._changed: dict[int, SlotInit] = {}
        self._params = SlotParams(
            temperature=torch.zeros(num_slots + 1, device=device),
            top_k=torch.zeros(num_slots + 1, dtype=torch.int32, device=device),
            top_p=torch.ones(num_slots + 1, device=device),
            min_p=torch.zeros(num_slots + 1, device=device),
            seed=torch.zeros(num_slots + 1, dtype=torch.int64, device=device),
        )
        self._stop_from = torch.zeros(num_slots + 1, dtype=torch.int32, device=device)
        self._stop_ids = torch.full((num_slots + 1, _STOP_IDS), -1, dtype=torch.int32, device=device)
        self._workspace = sampling_workspace(max_rows, vocab_size, device)
        self.ids = torch.zeros(max_rows, dtype=torch.int32, device=device)
        self.failed = torch.zeros(max_rows, dtype=torch.int32, device=device)

    def init_slot(self, init: SlotInit) -> bool:
        """Take over a slot's parameters; True if tensors were replaced, so that graphs that hold them are void."""
        params, slot = init.sampling_params, init.slot
        if params.logprobs is None:
            self._num_logprobs.pop(slot, None)
        else:
            self._num_logprobs[slot] = min(params.logprobs, self._vocab_size)
        special = not params.greedy or params.min_new_tokens > 0
        if special or slot in self._special:
            self._changed[slot] = init
        (self._special.add if special else self._special.discard)(slot)
        if not special or len(init.stop_token_ids) <= self._stop_ids.shape[1]:
            return False
        wider = torch.full((len(self._stop_ids), 2 * len(init.stop_token_ids)), -1, dtype=torch.int32)
        wider[:, : self._stop_ids.shape[1]] = self._stop_ids.cpu()
        self._stop_ids = wider.to(self._device)
        return True

    def draws(self, rows: Sequence[BatchRow]) -> bool:
        """True if some row is not simply greedy."""
        return bool(self._special) and any(row.slot in self._special for row in rows)

    def send_changes(self) -> None:
        """Copy the parameters of slots that changed to the device, in the current stream."""
        if not self._changed:
            return
        inits = list(self._changed.values())
        self._changed.clear()
        params = [init.sampling_params for init in inits]
        slots = self._tensor([init.slot for init in inits], torch.int64)

        def put(target: Tensor, values: Sequence[float]) -> None:
            target.index_copy_(0, slots, self._tensor(values, target.dtype))

        put(self._params.temperature, [p.temperature for p in params])
        put(self._params.top_k, [p.top_k if p.top_k < self._vocab_size else 0 for p in params])
        put(self._params.top_p, [p.top_p for p in params])
        put(self._params.seed, [init.seed for init in inits])
        put(self._stop_from, [init.num_prompt_tokens + init.sampling_params.min_new_tokens for init in inits])
        stop_ids = torch.full((len(inits), self._stop_ids.shape[1]), -1, dtype=torch.int32)
        for line, init in zip(stop_ids, inits, strict=True):
            if init.sampling_params.min_new_tokens:
                known = [token_id for token_id in init.stop_token_ids if token_id < self._vocab_size]
                line[: len(known)] = torch.tensor(known, dtype=torch.int32)
        self._stop_ids.index_copy_(0, slots, stop_ids.to(self._device))

    def choose(self, logits: Tensor, step: DeviceStep, bucket: Bucket) -> None:
        """Queue the choice of `ids` and `failed` from logits [bucket.num_samples, vocab]; allocates nothing."""
        ids, failed = self.ids[: bucket.num_samples], self.failed[: bucket.num_samples]
        if not bucket.draws:
            sample_greedy(logits, step.counts, ids, failed, self._workspace)
            return
        slots, positions = step.sample_slots, step.sample_positions
        forbid_stops(logits, step.counts, slots, positions, self._stop_from, self._stop_ids)
        sample(logits, step.counts, slots, positions, self._params, ids, failed, self._workspace)

    def logprobs(self, logits: Tensor, sampled: Sequence[int]) -> PendingLogprobs | None:
        """Queue the log-probabilities that the sampled slots want, from the logits that `choose` has just used."""
        if not self._num_logprobs:
            return None
        rows = [(row, slot, self._num_logprobs[slot]) for row, slot in enumerate(sampled) if slot in self._num_logprobs]
        if not rows:
            return None
        index = self._tensor([row for row, _, _ in rows], torch.int64)
        values = torch.log_softmax(logits.index_select(0, index), dim=-1)
        chosen = values.gather(1, self.ids[index].long()[:, None])
        top = values.topk(max(count for _, _, count in rows), dim=-1)
        return PendingLogprobs(rows, self._to_host(torch.cat((chosen, top.values), dim=1)), self._to_host(top.indices))

    def _tensor(self, values: Sequence[float], dtype: torch.dtype) -> Tensor:
        pinned = torch.tensor(values, dtype=dtype, pin_memory=self._device.type == "cuda")
        return pinned.to(self._device, non_blocking=True)

    def _to_host(self, tensor: Tensor) -> Tensor:
        target = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=self._device.type == "cuda")
        return target.copy_(tensor, non_blocking=True)
