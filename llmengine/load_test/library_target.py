"""A load's target that is an `LLM` in this process."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import anyio.to_thread

from llmengine.load_test.records import LoadRequest, RequestRecord
from llmengine.sampling_params import SamplingParams

if TYPE_CHECKING:
    from llmengine.engine.handle import RequestHandle
    from llmengine.llm import LLM


class LibraryTarget:
    """Streams requests from an `LLM`, whose event loop is the load's.

    Args:
        params: of each request, apart from `max_new_tokens`.
    """

    def __init__(self, llm: LLM, params: SamplingParams) -> None:
        self._llm = llm
        self._params = params

    async def serve(self, request: LoadRequest, record: RequestRecord) -> None:
        """See `Target.serve`. A request that fails alone raises its `LLMEngineError`."""
        async for output in self._submit(request):
            num_new = len(output.token_ids_delta)
            if num_new:
                record.arrived(time.perf_counter(), num_new)
            if output.finished:
                record.num_prompt_tokens = output.num_prompt_tokens
                record.num_output_tokens = output.num_tokens
                record.finish_reason = output.finish_reason
                record.finished = time.perf_counter()
                if output.error is not None:
                    raise output.error

    async def count_prompt_tokens(self, request: LoadRequest) -> int:
        """See `Target.count_prompt_tokens`."""
        prompt = request.prompt if request.messages is None else list(request.messages)
        assert prompt is not None
        return await anyio.to_thread.run_sync(self._llm.count_tokens, prompt)

    def _submit(self, request: LoadRequest) -> RequestHandle:
        params = self._params.replace(max_new_tokens=request.output_tokens)
        if request.messages is not None:
            return self._llm.chat_async(request.messages, params, streaming=True)
        assert request.prompt is not None
        return self._llm.generate_async(request.prompt, params, streaming=True)
