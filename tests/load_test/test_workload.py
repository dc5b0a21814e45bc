"""Prompts: their lengths, their prefixes, and files of them."""

from __future__ import annotations

import itertools
import random
from pathlib import Path

import pytest

from llmengine.errors import ConfigError
from llmengine.load_test.records import LoadRequest
from llmengine.load_test.workload import Lengths, Synthetic, WordScale, cycle_requests, measure_scale, read_prompts

WORDS = WordScale(tokens=0, tokens_per_word=1)


def texts(load: Synthetic, count: int, seed: int = 0) -> list[str]:
    made = itertools.islice(load.requests(WORDS, chat=False, seed=seed), count)
    return [request.prompt for request in made if request.prompt is not None]


def test_lengths_fill_their_range() -> None:
    load = Synthetic(Lengths(5, 9), Lengths(2, 3))
    made = list(itertools.islice(load.requests(WORDS, chat=False, seed=0), 200))
    assert {len((request.prompt or "").split()) for request in made} == set(range(5, 10))
    assert {request.output_tokens for request in made} == {2, 3}


def test_the_seed_decides_the_prompts() -> None:
    load = Synthetic(Lengths(20, 30), Lengths(1, 1))
    assert texts(load, 5, seed=1) == texts(load, 5, seed=1)
    assert not set(texts(load, 5, seed=1)) & set(texts(load, 5, seed=2))


def test_a_prefix_is_part_of_the_length() -> None:
    made = texts(Synthetic(Lengths(20, 20), Lengths(1, 1), shared_prefix_tokens=15), 10)
    assert {len(text.split()) for text in made} == {20}
    assert len({" ".join(text.split()[:15]) for text in made}) == 1
    assert len(set(made)) == 10


def test_a_prefix_must_leave_room() -> None:
    with pytest.raises(ConfigError, match="shared_prefix_tokens=20 leaves nothing of prompt_tokens=20-30"):
        Synthetic(Lengths(20, 30), Lengths(1, 1), shared_prefix_tokens=20)


class CountsNothing:
    """A target that counts every prompt as empty."""

    async def serve(self, request: LoadRequest, record: object) -> None:
        raise NotImplementedError

    async def count_prompt_tokens(self, request: LoadRequest) -> int:
        return 0


async def test_a_count_that_does_not_grow_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"prompts of \(16, 144\) words have \[0, 0\] tokens"):
        await measure_scale(CountsNothing(), chat=True)


def test_a_length_of_few_tokens_is_one_word() -> None:
    assert WordScale(tokens=30, tokens_per_word=1).num_words(5) == 1


def test_files_have_prompts_and_conversations(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text(
        '{"prompt": "Hello", "output_tokens": 3}\n\n{"messages": [{"role": "user", "content": "Hi"}]}\n', "utf-8"
    )
    found = read_prompts(path, Lengths(9, 9), chat=True, seed=0)
    user = {"role": "user"}
    assert found == [
        LoadRequest(None, [user | {"content": "Hello"}], 3),
        LoadRequest(None, [user | {"content": "Hi"}], 9),
    ]
    assert list(itertools.islice(cycle_requests(found), 3)) == [found[0], found[1], found[0]]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no prompts"),
        ("{", ":1: not valid JSON"),
        ('{"prompt": "a"}\n[]', ":2: must be an object with 'prompt' or 'messages'"),
        ('{"prompt": "a", "max_tokens": 3}', ":1: must be an object with 'prompt' or 'messages'"),
        ('{"prompt": "a", "messages": [{}]}', ":1: must have either 'prompt', a string, or 'messages'"),
        ('{"prompt": 3}', ":1: must have either 'prompt', a string, or 'messages'"),
        ('{"prompt": "a", "output_tokens": 0}', ":1: output_tokens must be an integer of at least 1, not 0"),
        ('{"messages": [{"role": "user"}]}', ":1: messages need the chat API"),
    ],
)
def test_a_line_that_is_anything_else_is_named(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text(text, "utf-8")
    with pytest.raises(ConfigError) as caught:
        read_prompts(path, Lengths(1, 1), chat=False, seed=0)
    assert str(path) in str(caught.value)
    assert message in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        read_prompts(tmp_path / "none", Lengths(1, 1), chat=False, seed=0)


def test_lengths_are_drawn_from_both_ends() -> None:
    rng = random.Random(0)
    assert {Lengths(1, 2).draw(rng) for _ in range(50)} == {1, 2}
