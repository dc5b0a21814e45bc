"""Beam search on top of ordinary requests: each step asks for one token of each beam, with its likeliest alternatives.

A beam's request finds the full blocks of its tokens in the prefix cache, so a step computes at most one block for each
beam. All beams of all prompts are in flight together. Without the prefix cache, each step computes the beams anew.

The search is that of transformers' `generate(num_beams=...)`. A `BeamSearch` handles one prompt and knows no engine.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from llmengine.batch import TokenLogprobs
from llmengine.checks import require_int, require_number, requirement
from llmengine.engine.handle import RequestHandle
from llmengine.engine.intake import Intake
from llmengine.engine.prompt_encoder import Prompt
from llmengine.errors import InvalidRequestError, RequestFailedError
from llmengine.outputs import GenerationOutput
from llmengine.request_options import RequestOptions
from llmengine.sampling_params import MAX_LOGPROBS, SamplingParams

Submit = Callable[[Sequence[int], SamplingParams, RequestOptions], RequestHandle]
"""Submits token ids as a request."""

BeamFinishReason = Literal["stop", "length", "timeout"]

_LEAST_S = 1e-6
"""Stands for the rest of a deadline that has passed, so that the request ends before its first step."""


@dataclass(frozen=True, slots=True)
class BeamSearchParams:
    """How to search. Raises `InvalidRequestError` for a value out of range.

    Attributes:
        num_beams: number of beams that are followed, and of outputs, in [1, 20 - number of EOS ids].
        max_new_tokens: most tokens of an output, >= 1; fewer if the context ends before.
        length_penalty: outputs are ranked by cumulative log-probability / length ** length_penalty, in [-10, 10]. A
            positive value favours long outputs, a negative one short outputs.
        early_stopping: when to end although beams could go on. True: as soon as there are `num_beams` outputs. False:
            when the best beam, if it ended now, would not be among them. "never": when no beam can get among them.
    """

    num_beams: int = 4
    max_new_tokens: int = 128
    length_penalty: float = 1.0
    early_stopping: bool | Literal["never"] = False

    def __post_init__(self) -> None:
        for name in ("num_beams", "max_new_tokens"):
            require_int(name, getattr(self, name), 1)
        require_number("length_penalty", self.length_penalty, -10, 10)
        if not isinstance(self.early_stopping, bool) and self.early_stopping != "never":
            raise requirement(InvalidRequestError, "early_stopping", "True, False or 'never'", self.early_stopping)


@dataclass(frozen=True, slots=True)
class BeamOutput:
    """One of the best continuations of a prompt.

    Attributes:
        index: 0 for the best.
        text: the text that `generate` gives for the same tokens, without special tokens; "" without a tokenizer.
        token_ids: generated ids, including an EOS that ended the output.
        cumulative_logprob: sum of the tokens' log-probabilities.
        score: outputs are ranked by it, highest first; see `BeamSearchParams.length_penalty`.
        finish_reason: "stop" at an EOS, "length" at the limit, "timeout" if a deadline ended the search.
    """

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float
    score: float
    finish_reason: BeamFinishReason


@dataclass(frozen=True, slots=True)
class BeamSearchOutput:
    """The outputs of one prompt, best first.

    Attributes:
        prompt: text of the prompt; None if the caller gave token ids.
        request_id, metadata: the caller's; None if it gave none.
    """

    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[BeamOutput]
    request_id: str | None = None
    metadata: Any = None

    @property
    def text(self) -> str:
        """Text of the best output."""
        return self.outputs[0].text

    @property
    def token_ids(self) -> list[int]:
        """Token ids of the best output."""
        return self.outputs[0].token_ids


@dataclass(frozen=True, slots=True)
class _Beam:
    token_ids: tuple[int, ...] = ()
    logprob: float = 0.0


@dataclass(frozen=True, slots=True)
class _Hypothesis:
    beam: _Beam
    score: float
    finish_reason: BeamFinishReason


@dataclass(slots=True)
class BeamSearch:
    """The search for one prompt. Call `advance()` with the tokens after each of `prefixes` until it is `finished`.

    Attributes:
        max_new_tokens: most tokens of an output, within the context.
        forbidden: sequences of token ids that no output has.
        options: options of the whole search.
        began: `time.monotonic()` from which its deadlines count.
    """

    prompt: str | None
    prompt_token_ids: Sequence[int]
    params: BeamSearchParams
    eos_token_ids: frozenset[int]
    max_new_tokens: int
    forbidden: tuple[tuple[int, ...], ...] = ()
    options: RequestOptions = field(default_factory=RequestOptions)
    began: float = field(default_factory=time.monotonic)
    finished: bool = False
    _beams: list[_Beam] = field(default_factory=lambda: [_Beam()])
    _hypotheses: list[_Hypothesis] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.num_alternatives > MAX_LOGPROBS:
            most = MAX_LOGPROBS - self.num_alternatives + self.params.num_beams
            beside = f"{len(self.eos_token_ids)} EOS ids"
            if self.forbidden:
                beside += f" and {len(self._forbidden_ends)} tokens that the model must not generate"
            raise InvalidRequestError(f"num_beams must be in [1, {most}] with {beside}, not {self.params.num_beams}")

    @property
    def num_alternatives(self) -> int:
        """Number of the likeliest tokens after each beam that count: enough of them can go on for every beam."""
        return self.params.num_beams + len(self.eos_token_ids | self._forbidden_ends)

    @property
    def _forbidden_ends(self) -> frozenset[int]:
        return frozenset(word[-1] for word in self.forbidden)

    @property
    def prefixes(self) -> list[list[int]]:
        """Token ids of the beams, prompt first."""
        return [[*self.prompt_token_ids, *beam.token_ids] for beam in self._beams]

    def advance(self, following: Sequence[TokenLogprobs]) -> None:
        """Extend the beams by one token, given the likeliest `num_alternatives` tokens after each of `prefixes`."""
        num_beams = self.params.num_beams
        candidates = [
            _Beam((*beam.token_ids, token_id), beam.logprob + logprob)
            for beam, entry in zip(self._beams, following, strict=True)
            for token_id, logprob in zip(entry.top_ids, entry.top_logprobs, strict=True)
            if not self._is_forbidden(beam, token_id)
        ]
        candidates.sort(key=lambda beam: -beam.logprob)
        length = len(candidates[0].token_ids)
        at_limit = length >= self.max_new_tokens
        continued: list[_Beam] = []
        for rank, beam in enumerate(candidates):
            if at_limit or beam.token_ids[-1] in self.eos_token_ids:
                if rank < num_beams:
                    self._add(beam)
            elif len(continued) < num_beams:
                continued.append(beam)
        self._beams = continued
        self.finished = at_limit or not continued or self._may_stop(length)

    @property
    def remaining_options(self) -> RequestOptions:
        """Options of the requests for the next token, with the rest of the deadlines."""
        has_tokens = bool(self._beams and self._beams[0].token_ids)
        return self.options.replace(
            deadline_s=self._remaining_s(self.options.deadline_s),
            first_token_deadline_s=None if has_tokens else self._remaining_s(self.options.first_token_deadline_s),
        )

    def expire(self) -> None:
        """End the search with the beams as they are."""
        for beam in self._beams:
            self._add(beam, "timeout")
        self.finished = True

    def _remaining_s(self, seconds: float | None) -> float | None:
        return None if seconds is None else max(self.began + seconds - time.monotonic(), _LEAST_S)

    def output(self, text: Callable[[Sequence[int], Sequence[int]], str]) -> BeamSearchOutput:
        """The outputs found so far; `text(prompt_token_ids, token_ids)` gives the text of ids after a prompt."""
        outputs = [
            BeamOutput(
                index,
                text(self.prompt_token_ids, found.beam.token_ids[: -1 if found.finish_reason == "stop" else None]),
                list(found.beam.token_ids),
                found.beam.logprob,
                found.score,
                found.finish_reason,
            )
            for index, found in enumerate(self._hypotheses)
        ]
        return BeamSearchOutput(
            self.prompt, list(self.prompt_token_ids), outputs, self.options.request_id, self.options.metadata
        )

    def _is_forbidden(self, beam: _Beam, token_id: int) -> bool:
        tokens = (*self.prompt_token_ids, *beam.token_ids, token_id) if self.forbidden else ()
        return any(tokens[-len(word) :] == word for word in self.forbidden)

    def _add(self, beam: _Beam, reason: BeamFinishReason | None = None) -> None:
        """Keep a finished beam if it is among the best."""
        if reason is None:
            reason = "stop" if beam.token_ids[-1] in self.eos_token_ids else "length"
        self._hypotheses.append(_Hypothesis(beam, self._score(beam.logprob, len(beam.token_ids)), reason))
        self._hypotheses.sort(key=lambda found: -found.score)
        del self._hypotheses[self.params.num_beams :]

    def _may_stop(self, length: int) -> bool:
        if len(self._hypotheses) < self.params.num_beams:
            return False
        if self.params.early_stopping is True:
            return True
        if self.params.early_stopping == "never" and self.params.length_penalty > 0:
            length = self.max_new_tokens
        return self._score(self._beams[0].logprob, length) <= self._hypotheses[-1].score

    def _score(self, logprob: float, length: int) -> float:
        return logprob / math.pow(max(length, 1), self.params.length_penalty)


def begin(
    intake: Intake, prompts: Iterable[Prompt], params: BeamSearchParams, options: RequestOptions
) -> list[BeamSearch]:
    """A search for each prompt. Blocks while text is tokenized, which counts for the deadlines of `options`.

    Raises `InvalidRequestError`, `PromptTooLongError`, `EngineClosedError` and `EngineDeadError`.
    """
    began = time.monotonic()
    intake.check_open()
    encoded = [intake.encode(prompt) for prompt in prompts]
    return [
        BeamSearch(
            one.text,
            one.token_ids,
            params,
            intake.eos_token_ids,
            min(params.max_new_tokens, intake.max_model_len - len(one.token_ids)),
            intake.forbidden,
            options,
            began,
        )
        for one in encoded
    ]


def run(searches: Sequence[BeamSearch], submit: Submit) -> None:
    """Finish all searches, blocking this thread."""
    while active := [search for search in searches if not search.finished]:
        handles: list[RequestHandle] = []
        try:
            _submit_all(active, submit, handles)
            outputs = [handle.result() for handle in handles]
        finally:
            _abort_all(handles)
        _advance_all(active, outputs)


async def run_async(searches: Sequence[BeamSearch], submit: Submit) -> None:
    """Finish all searches; `submit` must not block. If this is cancelled, all requests are aborted."""
    while active := [search for search in searches if not search.finished]:
        handles: list[RequestHandle] = []
        try:
            _submit_all(active, submit, handles)
            outputs = [await handle for handle in handles]
        finally:
            _abort_all(handles)
        _advance_all(active, outputs)


def _submit_all(active: Iterable[BeamSearch], submit: Submit, handles: list[RequestHandle]) -> None:
    for search in active:
        params = SamplingParams(max_new_tokens=1, logprobs=search.num_alternatives, ignore_eos=True)
        handles.extend(submit(prefix, params, search.remaining_options) for prefix in search.prefixes)


def _abort_all(handles: Iterable[RequestHandle]) -> None:
    for handle in handles:
        handle.abort()


def _advance_all(active: Iterable[BeamSearch], outputs: Iterable[GenerationOutput]) -> None:
    remaining = iter(outputs)
    for search in active:
        own = [next(remaining) for _ in search.prefixes]
        if any(output.finish_reason == "timeout" for output in own):
            search.expire()
        else:
            search.advance([_following(output) for output in own])


def _following(output: GenerationOutput) -> TokenLogprobs:
    """The tokens that may come after a beam. Raises the error of a request that generated no token."""
    if not output.logprobs:
        raise output.error or RequestFailedError(f"the request of a beam ended with {output.finish_reason!r}")
    return output.logprobs[0]
