"""StepPlan and LaunchedStep: a step of the scheduler before and after its launch."""

from __future__ import annotations

from dataclasses import dataclass, field

from llmengine.batch import Batch, BatchRow, SlotInit
from llmengine.engine.request import Request
from llmengine.structured.grammar import Grammar


@dataclass(slots=True)
class StepPlan:
    """A step while it is put together.

    Attributes:
        budget: prompt tokens that may still be added.
        requests: `requests[i]` has row i.
        masks: see `Batch`.
    """

    budget: int = 0
    rows: list[BatchRow] = field(default_factory=list)
    requests: list[Request] = field(default_factory=list)
    slot_inits: list[SlotInit] = field(default_factory=list)
    masks: dict[int, bytes] = field(default_factory=dict)

    def num_launched_tokens(self, request: Request) -> int:
        """Tokens of the request that the steps before this one compute."""
        if request in self.requests:
            return self.rows[self.requests.index(request)].start
        return request.num_computed_tokens

    def mask(self, request: Request, grammar: Grammar) -> None:
        """Have the step sample a token of the request that its grammar allows."""
        assert request.slot is not None
        assert not request.is_awaited
        self.masks[request.slot] = grammar.mask
        request.is_awaited = True


@dataclass(slots=True)
class LaunchedStep:
    """A step whose result is not known yet.

    Attributes:
        requests: `requests[i]` has row i of `batch`.
        num_preemptions: of each request when the step was scheduled.
        num_prompt_tokens: prompt tokens in the step.
        num_tokens: all tokens in the step.
        scheduled: moment of scheduling, where the pace of prompts is measured.
    """

    batch: Batch
    requests: list[Request]
    num_preemptions: list[int]
    num_prompt_tokens: int
    num_tokens: int
    scheduled: float


def slot_init(request: Request) -> SlotInit:
    """The state with which a request begins in its slot."""
    assert request.slot is not None
    return SlotInit(
        slot=request.slot,
        token_ids=tuple(request.token_ids),
        num_prompt_tokens=len(request.prompt_token_ids),
        sampling_params=request.params,
        seed=request.seed,
        stop_token_ids=request.stop_token_ids,
    )
