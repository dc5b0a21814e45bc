"""The router: prefixes against load, and what it remembers."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from benchmarks.simulate_router import policies, simulate, workload
from llmengine.cluster.router import CHUNK_CHARS, CHUNK_TOKENS, Router, prefix_keys

LONG = list(range(4 * CHUNK_TOKENS))


def test_keys_are_those_of_whole_chunks() -> None:
    keys = prefix_keys(LONG[:-1])
    assert len(keys.chunks) == 3
    assert keys.num_tokens == len(LONG) - 1
    assert prefix_keys(LONG).chunks[:3] == keys.chunks
    changed = [*LONG[:CHUNK_TOKENS], -1, *LONG[CHUNK_TOKENS + 1 :]]
    assert prefix_keys(changed).chunks[0] == keys.chunks[0]
    assert not set(prefix_keys(changed).chunks[1:]) & set(keys.chunks)
    assert prefix_keys(LONG, salt="mine").chunks != prefix_keys(LONG).chunks
    text = "x" * (2 * CHUNK_CHARS)
    assert prefix_keys(text).num_tokens == 2 * CHUNK_TOKENS
    assert len(prefix_keys(text).chunks) == 2


def test_the_replica_with_the_prefix_is_chosen_until_it_has_too_much_to_do() -> None:
    router = Router()
    keys = prefix_keys(LONG)
    router.note(1, keys)
    assert router.choose({0: 0, 1: 0, 2: 0}, keys) == 1
    assert router.choose({0: 0, 1: 1, 2: 0}, keys) == 1
    assert router.choose({0: 0, 1: 100, 2: 0}, keys) != 1
    assert router.choose({0: 3, 1: 100, 2: 2}, prefix_keys([1])) == 2
    router.forget(1)
    assert router.matched_chunks(1, keys) == 0


def test_what_was_not_used_for_long_is_forgotten_longest_beginnings_first() -> None:
    router = Router(max_chunks=6)
    old, new = prefix_keys(LONG), prefix_keys(LONG, salt="new")
    router.note(0, old)
    router.note(0, new)
    assert router.matched_chunks(0, new) == 4
    assert router.matched_chunks(0, old) == 2


@given(st.dictionaries(st.integers(0, 20), st.integers(0, 50), min_size=1), st.lists(st.integers(0, 3), max_size=300))
def test_one_of_those_that_may_be_chosen_is(loads: dict[int, int], prompt: list[int]) -> None:
    router = Router()
    keys = prefix_keys(prompt)
    router.note(7, keys)
    chosen = router.choose(loads, keys)
    assert chosen in loads
    if not keys.chunks:
        assert loads[chosen] == min(loads.values())


def test_prefixes_are_found_without_overloading_anybody() -> None:
    results = {
        name: simulate(workload(1500, rate=300.0, num_prefixes=50, seed=1), 16, choose)
        for name, choose in policies(seed=1).items()
    }
    ours, by_load, by_hash = results["router"], results["fewest requests"], results["hash of the beginning"]
    assert ours.hit_rate > 2 * by_load.hit_rate
    assert ours.hit_rate > 0.9 * by_hash.hit_rate
    assert ours.ttft_p99_s < by_hash.ttft_p99_s
    assert ours.most_busy < 1.1 * by_load.most_busy
