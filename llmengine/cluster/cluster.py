"""Cluster: the asynchronous API of `LLM` over replicas of one model."""

from __future__ import annotations

import asyncio
import itertools
import random
import weakref
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self, Unpack

from llmengine.batch import BackendInfo
from llmengine.chat.messages import Messages, plain_messages, plain_value
from llmengine.checks import require_int, require_number
from llmengine.cluster.config import ClusterConfig
from llmengine.cluster.core import ClusterCore
from llmengine.cluster.remote_request import RemoteRequest, new_stream
from llmengine.cluster.router import prefix_keys
from llmengine.cluster.transport import TransportFactory
from llmengine.cluster.wire import ChatCall, ReplicaInfo, pack_request
from llmengine.config import ModelConfig
from llmengine.engine.handle import RequestHandle
from llmengine.engine.intake import RequestSpec
from llmengine.engine.prompt_encoder import Prompt, PromptEncoder, as_prompts
from llmengine.engine.stats import EngineHealth, EngineStats
from llmengine.outputs import GenerationOutput
from llmengine.request_options import (
    ChatKeywords,
    RequestKeywords,
    RequestOptions,
    as_options,
    split_options,
    takes_options,
)
from llmengine.sampling_params import SamplingParams

_EXIT_TIMEOUT_S = 10.0
_SENT_OPTIONS = ("priority", "tenant", "cache_salt", "wait_for_admission", "slow_consumer", "request_id")
"""Fields of `RequestOptions` that replicas are told; deadlines are told anew whenever a request is run."""


class Cluster:
    """Replicas of one model that serve any number of callers, from any thread and any event loop.

    `generate_async`, `chat_async` and `generate` are those of `LLM`, with the same handles, outputs, cancellation,
    deadlines and errors. What a replica refuses a request for is raised by the handle. Each request runs on one
    replica: on the least loaded one, or on one that has computed the prompt's beginning before.

    Closed by `aclose()`, `close()`, the end of an ``async with`` block, or when it is collected.
    """

    def __init__(self, core: ClusterCore, info: ReplicaInfo) -> None:
        """For `create` and `from_transports`."""
        self._core = core
        self._info = info
        self._token_ids = PromptEncoder(None, info.backend.vocab_size, info.backend.max_model_len)
        self._keys = itertools.count()
        self._seeds = random.Random()
        self._finalizer = weakref.finalize(self, _shut_down, core)

    @classmethod
    async def create(
        cls,
        config: ModelConfig | str | Path,
        cluster_config: ClusterConfig | None = None,
        *,
        tokenizer: Any = None,
        enable_tokenizer: bool = True,
    ) -> Self:
        """Start replicas on a Ray cluster, and return when all have loaded their model.

        Args:
            config, tokenizer, enable_tokenizer: the same as for `LLM`, on each replica; pickled.
            cluster_config: None for a single replica on the Ray cluster of this process, or on a new one.

        Raises:
            ConfigError, ModelLoadError, OutOfMemoryError: as `LLM` does, on a replica. A `ConfigError` also if an
                argument cannot be pickled.
            PlacementError: Ray did not find room for a replica within `start_timeout_s`. Ray's errors if there is no
                such cluster.
        """
        from llmengine.cluster.ray_transport import ray_transports

        cluster_config = cluster_config or ClusterConfig()
        make_transport = ray_transports(config, cluster_config, tokenizer, enable_tokenizer)
        return await cls.from_transports(make_transport, cluster_config)

    @classmethod
    async def from_transports(cls, make_transport: TransportFactory, config: ClusterConfig | None = None) -> Self:
        """A cluster whose replicas are reached in a way of the caller's, see `transport.Transport`."""
        core = ClusterCore(config or ClusterConfig(), make_transport)
        try:
            return cls(core, await asyncio.wrap_future(core.start()))
        except BaseException:
            core.stop()
            raise

    @property
    def info(self) -> BackendInfo:
        """Facts about a replica's backend, see `LLM.info`."""
        return self._info.backend

    def get_default_sampling_params(self) -> SamplingParams:
        """The parameters of requests that bring none, see `LLM.get_default_sampling_params`."""
        return self._info.default_params

    @takes_options()
    def generate_async(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        streaming: bool = False,
        **options: Unpack[RequestKeywords],
    ) -> RequestHandle:
        """Submit one request and return its handle at once, see `LLM.generate_async`.

        Raises:
            InvalidRequestError: a parameter is out of range, or cannot be pickled; the handle raises what depends on
                the model.
            EngineClosedError, EngineDeadError: the cluster is closed, or has lost all its replicas.
        """
        checked = as_options(Cluster.generate_async, options)
        return self._submit(self._checked(prompt), sampling_params, streaming, checked)

    @takes_options(ChatKeywords)
    def chat_async(
        self,
        messages: Messages,
        sampling_params: SamplingParams | None = None,
        streaming: bool = False,
        **options: Unpack[ChatKeywords],
    ) -> RequestHandle:
        """`generate_async` for a conversation, see `LLM.chat_async`; the replica renders it."""
        checked, rest = split_options(options)
        keywords = {name: plain_value(value, name) for name, value in rest.items()}
        return self._submit(ChatCall(plain_messages(messages), keywords), sampling_params, streaming, checked)

    async def generate(
        self,
        prompts: Prompt | Iterable[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        **options: Unpack[RequestKeywords],
    ) -> list[GenerationOutput]:
        """Generate for all prompts at once, and return their outputs in order.

        Raises what `generate_async` or a handle raises for the first prompt at fault; the others are then aborted.
        """
        checked = as_options(Cluster.generate, options, wait_for_admission=True)
        listed = list(as_prompts(prompts))
        params = sampling_params if isinstance(sampling_params, Sequence) else [sampling_params] * len(listed)
        handles: list[RequestHandle] = []
        try:
            for prompt, its_params in zip(listed, params, strict=True):
                handles.append(self._submit(self._checked(prompt), its_params, False, checked))
            return [await handle for handle in handles]
        finally:
            for handle in handles:
                handle.abort()

    def stats(self) -> dict[int, EngineStats]:
        """What each replica last said of its engine, by the replica's number; at most about a second old."""
        return self._core.stats()

    def health(self) -> EngineHealth:
        """Whether the cluster accepts requests, and if not, why."""
        return self._core.health()

    def replica_health(self) -> dict[int, EngineHealth]:
        """What each replica last said of its health, by its number; one that is being removed is "draining"."""
        return self._core.replica_health()

    async def scale(self, num_replicas: int, drain: float = 30.0) -> None:
        """Have so many replicas: start some, or remove those with the fewest requests. Return when that is done.

        A replica that is removed gets no more requests. Those that it has may go on for up to `drain` seconds; then
        they run again elsewhere if `ClusterConfig.rerun_requests` says so, and fail with a `ReplicaDeadError` if not.
        Requests are served all the while. If this is cancelled, a change that has begun goes on by itself. A later
        call counts from the number that an earlier one has asked for.

        Raises:
            InvalidRequestError: `num_replicas` or `drain` is out of range.
            EngineClosedError, EngineDeadError: the cluster is closed, or has lost all its replicas.
            ConfigError, ModelLoadError, OutOfMemoryError, PlacementError: a new replica could not be started three
                times in a row; the cluster goes on without it. Another call tries again.
        """
        require_int("num_replicas", num_replicas, 1)
        require_number("drain", drain, 0.0)
        await asyncio.wrap_future(self._core.scale(num_replicas, drain))

    async def aclose(self, drain: float = 0.0) -> None:
        """Close all replicas; first, requests go on for up to `drain` seconds. Idempotent."""
        self._core.stop(drain)
        await self._core.wait_over()
        self.close()

    def close(self) -> None:
        """`aclose()` for threads: blocks until all replicas are closed. Idempotent."""
        self._finalizer()
        self._core.join()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.aclose()

    def _checked(self, prompt: Prompt) -> str | tuple[int, ...]:
        """A prompt that can travel. Raises `InvalidRequestError` and `PromptTooLongError` for one of token ids."""
        return prompt if isinstance(prompt, str) else tuple(self._token_ids.encode(prompt).token_ids)

    def _for_replica(self, params: SamplingParams) -> SamplingParams:
        """Parameters under which a replica streams all outputs, of which the cluster chooses the best, and which give
        the same if a request is run again."""
        ranked = params.num_outputs > params.n and params.logprobs is None
        return params.replace(
            n=params.num_outputs,
            best_of=None,
            logprobs=0 if ranked else params.logprobs,
            seed=self._seeds.getrandbits(63) if params.seed is None else params.seed,
        )

    def _submit(
        self,
        prompt: str | tuple[int, ...] | ChatCall,
        params: SamplingParams | None,
        streaming: bool,
        options: RequestOptions,
    ) -> RequestHandle:
        spec = RequestSpec(params or self._info.default_params, options, streaming)
        sent_options = {name: getattr(options, name) for name in _SENT_OPTIONS}
        packed = pack_request(prompt, self._for_replica(spec.params), sent_options)
        key = next(self._keys)
        stream = new_stream(key, spec.params, options, self._info.max_unread_tokens)
        text = "\n".join(str(message) for message in prompt.messages) if isinstance(prompt, ChatCall) else prompt
        keys = prefix_keys(text, options.cache_salt)
        request = RemoteRequest(key, stream, packed, options, keys)
        handle = RequestHandle(stream, self._core.abort, streaming=streaming, owner=self)
        self._core.submit(request)
        return handle


def _shut_down(core: ClusterCore) -> None:
    """Stop a cluster that is closed or collected, on any thread."""
    core.stop()
    core.join(_EXIT_TIMEOUT_S)
