"""Sampling on the device: parameters of every slot, the choice of tokens in a step, log-probabilities after it."""

from __future__ import annotations

import itertools
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from llmengine.backends.cuda.buckets import Bucket
from llmengine.backends.logit_edits import INT_TABLES, NO_MASKS, Int32Array, SlotEdits, slot_edits
from llmengine.backends.prompt_logprobs import MAX_LOGITS, WantedLogprobs
from llmengine.batch import Batch, BatchRow, SlotInit, TokenLogprobs
from llmengine.kernels.logit_edits import EditTables, edit_logits
from llmengine.kernels.sampling import (
    SamplingWorkspace,
    SlotParams,
    TokenMasks,
    choose,
    sample,
    sample_greedy,
    sampling_workspace,
    summarize,
)
from llmengine.kernels.step import DeviceStep
from llmengine.sampling_params import MAX_LOGPROBS

_ENTRIES = 1024
_WORDS = 16
_RING = 8
"""Entries, words and latest tokens of a slot in the first tables; wider tables replace them when needed."""


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

    def collect(self) -> dict[int, Sequence[TokenLogprobs]]:
        """Log-probabilities of each slot's token."""
        lines = zip(self.rows, self.values.tolist(), self.ids.tolist(), strict=True)
        return {slot: (_entry(values, ids, count),) for (_, slot, count), values, ids in lines}


@dataclass(frozen=True, slots=True)
class PendingPromptLogprobs:
    """Log-probabilities of prompt tokens on their way to the host, valid when the step's event has passed.

    Attributes:
        wanted: the prompt tokens, one request after another.
        parts: fp32 [n, 1 + alternatives] and int64 [n, alternatives] as in `PendingLogprobs`, with rows of padding.
        sizes: how many rows of each part are used.
    """

    wanted: Sequence[WantedLogprobs]
    parts: Sequence[tuple[Tensor, Tensor]]
    sizes: Sequence[int]

    def collect(self) -> dict[int, list[TokenLogprobs]]:
        """Log-probabilities of each slot's prompt tokens."""
        lines = (
            line
            for (values, ids), size in zip(self.parts, self.sizes, strict=True)
            for line in zip(values[:size].tolist(), ids[:size].tolist(), strict=True)
        )
        return {
            item.slot: [_entry(values, ids, item.count) for values, ids in itertools.islice(lines, len(item.tokens))]
            for item in self.wanted
        }


def _ordered_top(values: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The largest values and their columns; equal values are in the order of their columns.

    torch's order among equal values depends on the number of rows, and so does its choice among those that equal the
    last one. So it is asked for more than `count`.
    """
    top = values.topk(min(2 * count, values.shape[1]), dim=-1)
    columns, order = top.indices.sort(dim=-1)
    ordered, order = top.values.gather(1, order).sort(dim=-1, descending=True, stable=True)
    return ordered[:, :count], columns.gather(1, order)[:, :count]


def _entry(values: list[float], ids: list[int], count: int) -> TokenLogprobs:
    return TokenLogprobs(values[0], tuple(ids[:count]), tuple(values[1 : count + 1]))


@dataclass(frozen=True, slots=True)
class SamplerTensors:
    """Device tensors of a sampler, with a line for padding after those of the slots.

    Attributes:
        floats: fp32 [6, num_slots + 1], of which `params` and `tables` hold views, so that one copy changes all.
        ints: int32 [5, num_slots + 1], likewise.
        params: how each slot samples.
        tables: edits of each slot's logits, wide enough for most requests.
        workspace: scratch of the kernels.
        ids: int32 [max_rows], the chosen tokens.
        failed: int32 [max_rows], 1 where a row allows no token.
    """

    floats: Tensor
    ints: Tensor
    params: SlotParams
    tables: EditTables
    workspace: SamplingWorkspace
    ids: Tensor
    failed: Tensor

    @staticmethod
    def allocate(num_slots: int, max_rows: int, vocab_size: int, device: torch.device) -> SamplerTensors:
        """Allocate tensors for slots that are all greedy and without edits."""
        floats = torch.zeros((6, num_slots + 1), device=device)
        ints = torch.zeros((5, num_slots + 1), dtype=torch.int32, device=device)
        temperature, top_p, min_p = floats[:3]
        top_k, counting, num_entries, num_words, ring_masks = ints
        seed = torch.zeros(num_slots + 1, dtype=torch.int64, device=device)
        tables = replace(
            EditTables.empty(num_slots, min(_ENTRIES, vocab_size), _WORDS, _WORDS, _RING, device),
            penalties=floats[3:],
            counting=counting,
            num_entries=num_entries,
            num_words=num_words,
            ring_masks=ring_masks,
        )
        return SamplerTensors(
            floats=floats,
            ints=ints,
            params=SlotParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, seed=seed),
            tables=tables,
            workspace=sampling_workspace(max_rows, vocab_size, device),
            ids=torch.zeros(max_rows, dtype=torch.int32, device=device),
            failed=torch.zeros(max_rows, dtype=torch.int32, device=device),
        )


class DeviceSampler:
    """Chooses tokens inside a step. Greedy steps read no parameters; `draws` tells which steps are not greedy.

    Args:
        deterministic: log-probabilities do not depend on those beside them, ties among the likeliest included.

    Attributes:
        ids: int32 [max_rows], the tokens that the step chose.
        failed: int32 [max_rows], 1 where a row allows no token.
    """

    def __init__(self, tensors: SamplerTensors, vocab_size: int, deterministic: bool = False) -> None:
        self._vocab_size = vocab_size
        self._deterministic = deterministic
        self._device = tensors.ids.device
        self._floats, self._ints = tensors.floats, tensors.ints
        self._params, self._tables = tensors.params, tensors.tables
        self._workspace = tensors.workspace
        self.ids, self.failed = tensors.ids, tensors.failed
        self._masks: TokenMasks | None = None
        self._num_logprobs: dict[int, int] = {}
        self._special: set[int] = set()
        self._changed: dict[int, tuple[SlotInit, SlotEdits | None]] = {}
        # For slots whose chosen tokens become entries: number of entries minus number of tokens when it was taken.
        self._counted: dict[int, int] = {}
        self._masked: set[int] = set()

    def prepare(self, batch: Batch, masks: Mapping[int, Int32Array] = NO_MASKS) -> bool:
        """Take over the slots that a step initialises; copies are queued in the current stream.

        Args:
            masks: slot -> int32 [ceil(vocab / 32)], the tokens that it may choose in this step, see `TokenMasks`.

        Returns whether tensors were replaced, which makes graphs of steps that draw void.
        """
        for init in batch.slot_inits:
            self._init_slot(init)
        replaced = self._make_room(batch.rows)
        self._send_changes()
        if masks or self._masked:
            replaced |= self._send_masks(masks)
        return replaced

    def draws(self, rows: Sequence[BatchRow], *, with_logprobs: bool = False) -> bool:
        """Whether some row is not simply greedy.

        Args:
            with_logprobs: a row that wants log-probabilities counts as well.
        """
        special = self._special | self._masked if self._masked else self._special
        if with_logprobs and self._num_logprobs:
            special = special | self._num_logprobs.keys()
        return bool(special) and any(row.slot in special for row in rows)

    def _init_slot(self, init: SlotInit) -> None:
        params, slot = init.sampling_params, init.slot
        if params.logprobs is None:
            self._num_logprobs.pop(slot, None)
        else:
            self._num_logprobs[slot] = min(params.logprobs, self._vocab_size)
        edits = slot_edits(init, self._vocab_size)
        special = edits is not None or not params.greedy
        if special or slot in self._special:
            self._changed[slot] = init, edits
        (self._special.add if special else self._special.discard)(slot)
        self._counted.pop(slot, None)
        if edits is not None and edits.counting:
            self._counted[slot] = len(edits.entry_ids) - len(init.token_ids)

    def _make_room(self, rows: Sequence[BatchRow]) -> bool:
        """Widen tables that the step could fill; return whether there were any."""
        if not self._changed and not self._counted:
            return False
        changed = [edits for _, edits in self._changed.values() if edits is not None]
        widths = {name: max((len(getattr(edits, name)) for edits in changed), default=0) for name in INT_TABLES}
        if self._counted:
            counted = (row for row in rows if row.slot in self._counted)
            most = max((self._counted[row.slot] + row.start + row.num_tokens + 1 for row in counted), default=0)
            widths["entry_ids"] = max(widths["entry_ids"], min(self._vocab_size, most))
        widths["entry_states"] = widths["entry_biases"] = widths["entry_logits"] = widths["entry_ids"]
        widths["word_logits"] = widths["word_ends"]
        wider = {}
        for name, width in widths.items():
            table: Tensor = getattr(self._tables, name)
            if width > table.shape[1]:
                more = (1 << (width - 1).bit_length()) - table.shape[1]
                wider[name] = torch.nn.functional.pad(table, (0, more))
        self._tables = replace(self._tables, **wider)
        return bool(wider)

    def _send_changes(self) -> None:
        if not self._changed:
            return
        inits, edits = zip(*self._changed.values(), strict=True)
        slots = self.to_device([init.slot for init in inits], torch.int64)
        self._changed.clear()
        floats, ints = zip(*(self._scalars(*change) for change in zip(inits, edits, strict=True)), strict=True)
        self._floats.index_copy_(1, slots, self.to_device(floats, torch.float32).T)
        self._ints.index_copy_(1, slots, self.to_device(ints, torch.int32).T)
        self._params.seed.index_copy_(0, slots, self.to_device([init.seed for init in inits], torch.int64))
        edited = {init.slot: item for init, item in zip(inits, edits, strict=True) if item is not None}
        if edited:
            self._send_edits(list(edited.values()), self.to_device(list(edited), torch.int64))

    def _scalars(self, init: SlotInit, edits: SlotEdits | None) -> tuple[Sequence[float], Sequence[int]]:
        """One slot's column of `_floats` and of `_ints`."""
        params = init.sampling_params
        floats = (params.temperature, params.top_p, params.min_p)
        top_k = params.top_k if params.top_k < self._vocab_size else 0
        if edits is None:
            return (*floats, 1.0, 0.0, 0.0), (top_k, 0, 0, 0, 0)
        sizes = len(edits.entry_ids), len(edits.word_ends), len(edits.ring) - 1
        return (*floats, *edits.penalties), (top_k, edits.counting, *sizes)

    def _send_edits(self, edits: Sequence[SlotEdits], slots: Tensor) -> None:
        for name in (*INT_TABLES, "entry_biases"):
            lines: list[NDArray[np.generic]] = [getattr(item, name) for item in edits]
            padded = np.zeros((len(lines), max(map(len, lines))), dtype=lines[0].dtype)
            if padded.size:
                for place, line in zip(padded, lines, strict=True):
                    place[: len(line)] = line
                table: Tensor = getattr(self._tables, name)
                table[:, : padded.shape[1]].index_copy_(0, slots, self._sent(torch.from_numpy(padded)))

    def _send_masks(self, masks: Mapping[int, Int32Array]) -> bool:
        """Give masks to these slots and to no others; return whether that took new tensors."""
        is_first = self._masks is None
        if self._masks is None:
            self._masks = self._new_masks()
        cleared = self._masked - masks.keys()
        if cleared:
            self._masks.lines.index_fill_(0, self.to_device(list(cleared), torch.int64), len(self._masks.lines) - 1)
        if masks:
            slots = self.to_device(list(masks), torch.int64)
            self._masks.words.index_copy_(0, slots, self._sent(torch.from_numpy(np.stack(list(masks.values())))))
            self._masks.lines.index_copy_(0, slots, slots.int())
        self._masked = set(masks)
        return is_first

    def _new_masks(self) -> TokenMasks:
        """Masks that allow everything: slots without a mask share the last line, which is all ones."""
        lines = torch.full_like(self._ints[0], self._ints.shape[1] - 1)
        words = torch.full((len(lines), -(-self._vocab_size // 32)), -1, dtype=torch.int32, device=self._device)
        return TokenMasks(lines, words)

    def choose(self, logits: Tensor, step: DeviceStep, bucket: Bucket) -> None:
        """Queue the choice of `ids` and `failed` from logits [bucket.num_samples, vocab]; allocates nothing."""
        if bucket.draws:
            self._bound(sample, logits, step, self._masks)()
        else:
            ids, failed = self.ids[: len(logits)], self.failed[: len(logits)]
            sample_greedy(logits, step.counts, ids, failed, self._workspace)

    def compilations(self, logits: Tensor, step: DeviceStep) -> list[Callable[[], None]]:
        """Calls that compile the kernels of steps that draw, one kernel each, with and without masks.

        The calls change nothing.

        Args:
            step: a step without rows.
        """
        first = step.counts, step.sample_slots
        calls: list[Callable[[], None]] = [partial(edit_logits, logits, *first, step.sample_positions, self._tables)]
        for masks in (None, self._new_masks()):
            calls.append(self._bound(choose, logits, step, masks))
            calls.append(partial(summarize, logits, *first, self._params, self._workspace, masks))
        return calls

    def _bound(
        self, function: Callable[..., None], logits: Tensor, step: DeviceStep, masks: TokenMasks | None
    ) -> partial[None]:
        """A call of `sample`, or of its part `choose`, for this step."""
        ids, failed = self.ids[: len(logits)], self.failed[: len(logits)]
        where = step.counts, step.sample_slots, step.sample_positions
        return partial(function, logits, *where, self._params, ids, failed, self._workspace, self._tables, masks)

    def logprobs(self, logits: Tensor, sampled: Sequence[int]) -> PendingLogprobs | None:
        """Queue the log-probabilities that the sampled slots want, from the logits that `choose` has just used.

        Works on a bounded number of logits at a time, since the copies are allocated now and not at the start.
        """
        if not self._num_logprobs:
            return None
        rows = [(row, slot, self._num_logprobs[slot]) for row, slot in enumerate(sampled) if slot in self._num_logprobs]
        if not rows:
            return None
        index = self.to_device([row for row, _, _ in rows], torch.int64)
        count = max(count for _, _, count in rows)
        parts = [
            self._logprobs(logits.index_select(0, part), self.ids[part].long(), count)
            for part in index.split(max(1, MAX_LOGITS // self._vocab_size))
        ]
        values, ids = parts[0] if len(parts) == 1 else map(torch.cat, zip(*parts, strict=True))
        return PendingLogprobs(rows, self._to_host(values), self._to_host(ids))

    def prompt_logprobs(
        self, wanted: Sequence[WantedLogprobs], logits_after: Callable[[Sequence[int]], Tensor], sizes: Sequence[int]
    ) -> PendingPromptLogprobs:
        """Queue the log-probabilities of prompt tokens, on a bounded number of logits at a time.

        Args:
            logits_after: indices of n of the step's tokens -> logits fp32 [n, vocab].
            sizes: the values that n may have, ascending from 1.
        """
        tokens = [token for item in wanted for token in item.tokens]
        token_ids = torch.cat([item.token_ids for item in wanted])
        count = max(item.count for item in wanted)
        parts, used, begin = [], [], 0
        for size, logits in self.logits_of(tokens, logits_after, sizes):
            chosen = F.pad(token_ids[begin : begin + size], (0, len(logits) - size))
            values, ids = self._logprobs(logits, self._sent(chosen), count)
            parts.append((self._to_host(values), self._to_host(ids)))
            used.append(size)
            begin += size
        return PendingPromptLogprobs(wanted, parts, used)

    def logits_of(
        self, tokens: Sequence[int], logits_after: Callable[[Sequence[int]], Tensor], sizes: Sequence[int]
    ) -> Iterator[tuple[int, Tensor]]:
        """Yield the logits of some of a step's tokens, a bounded number at a time: (tokens, their rows and padding).

        Args:
            logits_after, sizes: as for `prompt_logprobs`.
        """
        sizes = [size for size in sizes if size == 1 or size * self._vocab_size <= MAX_LOGITS]
        for begin in range(0, len(tokens), sizes[-1]):
            part = list(tokens[begin : begin + sizes[-1]])
            padding = [0] * (sizes[bisect_left(sizes, len(part))] - len(part))
            yield len(part), logits_after(part + padding)

    def _logprobs(self, logits: Tensor, token_ids: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """Log-probabilities of token_ids [n] and of the `count` likeliest tokens, and the ids of those."""
        # Rows that begin at a multiple of 16 bytes are all summed in the same order.
        padded = F.pad(logits, (0, -self._vocab_size % 4), value=float("-inf")) if self._vocab_size % 4 else logits
        values = torch.log_softmax(padded, dim=-1)
        top, ids = _ordered_top(values, MAX_LOGPROBS) if self._deterministic else values.topk(count, dim=-1)
        chosen = values.gather(1, token_ids[:, None])
        return torch.cat((chosen, top), dim=1), ids

    def to_device(self, values: Sequence[Any], dtype: torch.dtype) -> Tensor:
        """A new tensor on the device; the copy is queued in the current stream."""
        return self._sent(torch.tensor(values, dtype=dtype))

    def _sent(self, tensor: Tensor) -> Tensor:
        pinned = tensor.pin_memory() if self._device.type == "cuda" else tensor
        return pinned.to(self._device, non_blocking=True)

    def _to_host(self, tensor: Tensor) -> Tensor:
        target = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=self._device.type == "cuda")
        return target.copy_(tensor, non_blocking=True)
