"""Generation for many prompts at once: all of them are submitted, and their outputs are returned in order."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from llmengine.checks import requirement
from llmengine.engine.chat_prompt import ChatPrompt
from llmengine.engine.handle import RequestHandle
from llmengine.engine.intake import RequestSpec
from llmengine.engine.prompt_encoder import Prompt
from llmengine.errors import InvalidRequestError
from llmengine.llm_parts import LLMParts
from llmengine.outputs import GenerationOutput
from llmengine.request_options import RequestOptions
from llmengine.sampling_params import SamplingParams
from llmengine.terminal_progress import TerminalProgress


def generate_all(
    parts: LLMParts,
    prompts: Iterable[Prompt | ChatPrompt],
    sampling_params: SamplingParams | Sequence[SamplingParams] | None,
    options: RequestOptions,
    *,
    progress: bool = False,
) -> list[GenerationOutput]:
    """The outputs of all prompts, in their order; blocks until all are finished. See `LLM.generate`.

    If this raises, also on Ctrl-C, no request and no progress bar is left behind.
    """
    options = options.replace(slow_consumer=None)  # all requests are read to the end, however late
    handles: list[RequestHandle] = []
    try:
        for index, prompt in enumerate(prompts):
            spec = RequestSpec(_params_for(parts, sampling_params, index), options)
            handles.append(parts.intake.submit_blocking(prompt, spec, parts.owner))
        if isinstance(sampling_params, Sequence) and len(sampling_params) != len(handles):
            raise InvalidRequestError(f"got {len(sampling_params)} sampling_params for {len(handles)} prompts")
        outputs = []
        with TerminalProgress("generating", len(handles), enabled=progress) as bar:
            for handle in handles:
                outputs.append(handle.result())
                bar.advance()
        return outputs
    finally:
        for handle in handles:
            handle.abort()


def _params_for(
    parts: LLMParts, sampling_params: SamplingParams | Sequence[SamplingParams] | None, index: int
) -> SamplingParams:
    if sampling_params is None:
        return parts.require_default_params()
    if isinstance(sampling_params, SamplingParams):
        return sampling_params
    if not isinstance(sampling_params, Sequence):
        allowed = "a SamplingParams or a list of them"
        raise requirement(InvalidRequestError, "sampling_params", allowed, sampling_params)
    if index >= len(sampling_params):
        raise InvalidRequestError(f"got {len(sampling_params)} sampling_params for more than {index} prompts")
    return sampling_params[index]
