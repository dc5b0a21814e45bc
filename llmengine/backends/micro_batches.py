"""Steps cut into micro-batches, so that every stage of a pipeline has work.

While a stage computes one micro-batch, the stage after it computes the one before. A request's next row needs the token
that its latest row sampled at the end of the pipeline, so it waits until its micro-batch has gone through all stages.
With as many micro-batches as stages that is just when the first stage is done with the others of the step::

    first stage    a1 b1 c1 a2 b2 c2 a3 ...        a, b, c: micro-batches; 1, 2, 3: steps
    second            a1 b1 c1 a2 b2 c2 ...        a2 begins when the last stage has sampled a1
    last                 a1 b1 c1 a2 b2 ...

So rows stay in their micro-batch from step to step, as far as the micro-batches remain equal.
"""

from __future__ import annotations

from collections.abc import Sequence

from llmengine.batch import Batch, BatchRow, StepResult, TokenLogprobs

_WORTH_A_PASS = 16
"""A prompt makes further micro-batches for each so many tokens: fewer take a stage about as long as one does."""

_LEAST_PIECE = 4
"""Tokens of the smallest piece of a prompt that fills a micro-batch up."""

_SLACK = 8
"""Micro-batches may exceed an equal share of the rows by one in so many, and by one in any case if none is empty.

A row that moves to an earlier micro-batch makes the first stage wait, which costs more than that.
"""


class MicroBatcher:
    """Cuts steps into at most `num_stages` micro-batches of about equally many decodes, and tokens of prompts."""

    def __init__(self, num_stages: int) -> None:
        self._num_stages = num_stages
        self._latest: dict[int, int] = {}

    def split(self, batch: Batch) -> list[Batch]:
        """The micro-batches of a step, to be computed in this order; together they are the step.

        A prompt's tokens may be divided among several. Then the first has its new blocks, and the last samples.
        """
        decodes = [row for row in batch.rows if row.num_tokens == 1]
        prompts = [row for row in batch.rows if row.num_tokens > 1]
        num_pieces = len(decodes) + sum(max(1, row.num_tokens // _WORTH_A_PASS) for row in prompts)
        num = max(1, min(self._num_stages, num_pieces))
        parts: list[list[BatchRow]] = [[] for _ in range(num)]
        self._deal(decodes, parts)
        _pour(prompts, parts, -(-batch.num_tokens // num))
        self._latest.update((row.slot, index) for index, rows in enumerate(parts) for row in rows)
        return _batches(batch, [rows for rows in parts if rows] or [[]])

    def _deal(self, decodes: Sequence[BatchRow], parts: list[list[BatchRow]]) -> None:
        """Put each row where the slot's latest one was, while there is room, and the others where there are fewest."""
        share = -(-len(decodes) // len(parts))
        most = share if share == 1 else share + max(1, share // _SLACK)
        moved = []
        for row in decodes:
            index = self._latest.get(row.slot, len(parts))
            if index < len(parts) and len(parts[index]) < most:
                parts[index].append(row)
            else:
                moved.append((index, row))
        for before, row in moved:
            _, _, index = min((len(rows), index < before, index) for index, rows in enumerate(parts))
            parts[index].append(row)
        for empty in [rows for rows in parts if not rows and len(decodes) >= len(parts)]:
            empty.append(max(parts, key=len).pop())


def _pour(prompts: Sequence[BatchRow], parts: list[list[BatchRow]], capacity: int) -> None:
    """Put prompts where there is most room, up to `capacity` tokens; those that fit nowhere in pieces, in order."""
    room = [capacity - len(rows) for rows in parts]
    last = len(parts) - 1
    for row in prompts:
        first, index = 0, 0
        while left := row.num_tokens - first:
            if not first and (most := max(room)) >= left:
                index = room.index(most)
            while index < last and room[index] < min(left, _LEAST_PIECE):
                index += 1
            size = left if index == last or left - room[index] < _LEAST_PIECE else room[index]
            parts[index].append(_piece(row, first, size))
            room[index] -= size
            first += size


def _piece(row: BatchRow, first: int, size: int) -> BatchRow:
    """The tokens [first, first + size) of a row."""
    is_last = first + size == row.num_tokens
    return BatchRow(
        slot=row.slot,
        start=row.start + first,
        num_tokens=size,
        token_ids=row.token_ids[first : first + size],
        new_block_ids=() if first else row.new_block_ids,
        sample=row.sample if is_last else 0,
    )


def _batches(batch: Batch, parts: Sequence[Sequence[BatchRow]]) -> list[Batch]:
    inits = {init.slot: init for init in batch.slot_inits}
    result = []
    for rows in parts:
        own = [inits.pop(row.slot) for row in rows if row.slot in inits]
        masks = {row.slot: batch.masks[row.slot] for row in rows if row.sample and row.slot in batch.masks}
        result.append(Batch(batch.step, rows, own, masks))
    assert not inits, "a request that takes a slot has a row"
    return result


def merged(step: int, results: Sequence[StepResult]) -> StepResult:
    """The result of a step from those of its micro-batches, of which one at most samples for a slot."""
    prompt_logprobs: dict[int, list[TokenLogprobs]] = {}
    for result in results:
        for slot, values in result.prompt_logprobs.items():
            prompt_logprobs.setdefault(slot, []).extend(values)
    return StepResult(
        step=step,
        token_ids={slot: ids for result in results for slot, ids in result.token_ids.items()},
        logprobs={slot: values for result in results for slot, values in result.logprobs.items()},
        prompt_logprobs=prompt_logprobs,
        errors={slot: text for result in results for slot, text in result.errors.items()},
        forward_s=sum(result.forward_s for result in results),
        idle_s=sum(result.idle_s for result in results),
    )
