"""Tensor parallelism of the CUDA backend with real processes: on GPUs, or on a CPU through Triton's interpreter."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.pretended_hosts import PretendedHosts
from llmengine.backends.cuda import loading
from llmengine.backends.cuda.memory_errors import memory_returned_on_failure
from llmengine.backends.cuda.step_program import StepProgram
from llmengine.backends.ranks.backend import PreparingRanksBackend
from llmengine.checkpoints.opening import open_model
from llmengine.config import QuantConfig
from llmengine.errors import EngineClosedError, EngineDeadError
from llmengine.sampling_params import SamplingParams
from tests.backends.cuda.helpers import check_steps_in_flight, load_cuda, load_shared, ranks
from tests.backends.helpers import BackendDriver, DrivenRequest, reference_greedy, reference_logprobs, save_tiny
from tests.models.family_helpers import make_family

SMALL = {"vocab_size": 101, "hidden_size": 32, "intermediate_size": 48, "max_position_embeddings": 128}
ONE_LAYER = {**SMALL, "num_hidden_layers": 1}
PROMPT = [5, 90, 17, 44, 23, 8, 71]


@dataclass(frozen=True)
class Shared:
    """A model on two ranks, and transformers' own."""

    directory: Path
    reference: Any
    backend: PreparingRanksBackend
    driver: BackendDriver


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory, device: str) -> Iterator[Shared]:
    directory = tmp_path_factory.mktemp("tiny")
    reference = save_tiny(directory, **SMALL, attention_bias=True, mlp_bias=True)
    with load_shared(directory, device, 2) as backend:
        yield Shared(directory, reference, backend, BackendDriver(backend))


def test_tokens_of_steps_in_flight_are_those_of_one_process(shared: Shared) -> None:
    """The other rank gets the ids that rank 0 sampled while the host of neither has seen them."""
    check_steps_in_flight(shared.reference, shared.backend, {2: PROMPT[:3], 0: PROMPT})


def test_ranks_on_two_hosts_give_the_same_tokens(shared: Shared, device: str) -> None:
    if device == "cuda" and torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    with load_shared(shared.directory, device, 2, rank_hosts=PretendedHosts((0, 1))) as backend:
        driver = BackendDriver(backend)
        request = driver.add(0, PROMPT)
        for count in (len(PROMPT), 1, 1):
            driver.step((request, count))
        assert request.output_ids == reference_greedy(shared.reference, PROMPT, 3)


def test_log_probabilities_of_prompts_and_scores(shared: Shared) -> None:
    driver = shared.driver
    # A step that draws, whose only candidate is the likeliest token.
    params = SamplingParams(temperature=1.0, top_k=1, logprobs=2, prompt_logprobs=2)
    request = driver.add(1, PROMPT, params)
    result = driver.step((request, len(PROMPT)))
    assert request.output_ids == reference_greedy(shared.reference, PROMPT, 1)
    expected = reference_logprobs(shared.reference, PROMPT)
    for entry, row, token in zip(result.prompt_logprobs[1], expected, PROMPT[1:], strict=False):
        assert entry.logprob == pytest.approx(float(row[token]), abs=1e-4)
        assert entry.top_ids == tuple(row.topk(2).indices.tolist())
    scored = driver.add(3, PROMPT)
    logits = [rows.float().cpu().clone() for rows in shared.backend.score(driver.batch((scored, len(PROMPT))))]
    torch.testing.assert_close(torch.log_softmax(torch.cat(logits), dim=-1), expected, atol=2e-4, rtol=0)


def test_quiet_moments_are_used_together(shared: Shared) -> None:
    assert shared.backend.prepare()
    request = shared.driver.add(0, PROMPT[:1])
    assert shared.driver.generate([request], 1) == [reference_greedy(shared.reference, PROMPT[:1], 1)]


def test_the_whole_model_comes_back(shared: Shared) -> None:
    given = dict(open_model(shared.directory).weights(torch.float32))
    for name, tensor in shared.backend.weights():
        assert torch.equal(tensor, given.pop(name)), name
    assert not given
    info = shared.backend.info
    assert "2 ranks share each matrix" in info.description
    assert info.vocab_size == SMALL["vocab_size"]
    assert info.kv_bytes_per_block == 2 * 2 * 2 * 16 * 16 * 4  # layers, keys and values, heads, tokens, dimensions


def test_a_closed_backend_keeps_no_weights(tmp_path: Path, device: str) -> None:
    """Also while something still refers to it, as what watches the ranks does."""
    save_tiny(tmp_path, **ONE_LAYER)
    with load_shared(tmp_path, device, 2) as backend:
        backend.watch(lambda: None)
        _, first = next(backend.weights())
        own: Any = vars(backend)["_own"]
        kept = weakref.ref(own._program.model.weights.by_name["final_norm.weight"])
        del own, first
    assert kept() is None


def test_a_rank_that_dies_ends_all(tmp_path: Path, device: str) -> None:
    save_tiny(tmp_path, **ONE_LAYER)
    before = ranks()
    with load_shared(tmp_path, device, 2) as backend:
        (rank,) = ranks() - before
        driver = BackendDriver(backend)
        rank.kill()
        with pytest.raises(EngineDeadError, match=r"rank 1 of 2 .*SIGKILL"):
            driver.generate([driver.add(0, PROMPT)], 2)
    assert ranks() == before


@pytest.mark.parametrize(("tp_size", "pp_size"), [(2, 1), (1, 2)])
def test_loading_that_is_given_up_before_the_first_capture_leaves_nothing(
    tmp_path: Path, device: str, monkeypatch: pytest.MonkeyPatch, tp_size: int, pp_size: int
) -> None:
    """As after Ctrl-C: neither ranks nor threads, and no memory while the failure is handled."""
    save_tiny(tmp_path, **SMALL)
    kept, emptied = list[weakref.ref[torch.Tensor]](), list[bool]()
    processes, threads = ranks(), set(threading.enumerate())

    def give_up(program: StepProgram, budget_s: float) -> None:
        kept.extend(map(weakref.ref, (program.state.last_token_ids, *program.model.weights.by_name.values())))
        raise EngineClosedError("the LLM is closed")

    monkeypatch.setattr(loading, "tune", give_up)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append(any(one() is not None for one in kept)))
    loaded = load_shared(tmp_path, device, tp_size, pp_size)
    with pytest.raises(EngineClosedError), memory_returned_on_failure():
        loaded.__enter__()
    assert kept
    assert emptied[-1:] == [False], "the memory is free before it is given back"
    assert ranks() == processes
    assert set(threading.enumerate()) == threads


def test_a_capture_that_is_given_up_leaves_nothing(tmp_path: Path, device: str) -> None:
    save_tiny(tmp_path, **ONE_LAYER)
    processes, given_up = ranks(), threading.Event()

    def check() -> None:
        if given_up.is_set():
            raise EngineClosedError("the LLM is closed")

    with load_shared(tmp_path, device, 2, check_wanted=check) as backend:
        given_up.set()
        with pytest.raises(EngineClosedError):
            backend.prepare()
    assert ranks() == processes


@pytest.mark.slow
@pytest.mark.parametrize(
    ("size", "settings"),
    [
        (3, {}),  # 4 heads, of which 2 ranks share one of keys and values
        (2, {"deterministic": True}),
        (2, {"quant_config": QuantConfig(weights="int8")}),
        (2, {"quant_config": QuantConfig.preset("int4-rtn", group_size=32)}),
    ],
    ids=["3 ranks", "deterministic", "int8", "int4"],
)
def test_options(tmp_path: Path, device: str, size: int, settings: dict[str, Any]) -> None:
    save_tiny(tmp_path, **{**ONE_LAYER, "hidden_size": 64, "intermediate_size": 128})
    with load_shared(tmp_path, device, size, **settings) as backend:
        driver = BackendDriver(backend)
        outputs = driver.generate([driver.add(1, PROMPT)], 3)
    assert outputs == _alone(tmp_path, device, 3, **settings)


def _alone(directory: Path, device: str, num_tokens: int, **settings: Any) -> list[list[int]]:
    """What one process says."""
    backend = load_cuda(directory, device, **settings)
    driver = BackendDriver(backend)
    outputs = driver.generate([driver.add(1, PROMPT)], num_tokens)
    backend.close()
    return outputs


@pytest.mark.slow
@pytest.mark.parametrize("family", ["gemma2", "olmo2"])
def test_models_of_generic_segments(tmp_path: Path, device: str, family: str) -> None:
    """Gemma 2 has norms after the sums, a soft cap of the logits, and tied embeddings that are scaled.

    OLMo 2 has norms of q and k over the heads of all ranks.
    """
    model = make_family(family)
    model.save_pretrained(tmp_path)
    with load_shared(tmp_path, device, 2) as backend:
        driver = BackendDriver(backend)
        request: DrivenRequest = driver.add(1, PROMPT)
        driver.generate([request], 2)
    assert request.output_ids == reference_greedy(model, PROMPT, 2)
