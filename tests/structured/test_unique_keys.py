"""JSON objects with free keys: no key replaces a typed one or counts twice, whatever tokens the model chooses."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmengine import LLM, InvalidRequestError, SamplingParams, StructuredOutput
from llmengine.errors import RequestFailedError
from llmengine.structured.grammar import GrammarCompiler
from llmengine.structured.unique_keys import KeyTracker, QuoteTokens
from llmengine.testing import FakeBackend
from llmengine.tokenizer.protocol import ByteTokenizer

EOS = 256
PIECES = [
    b'"a"',
    b'"a":',
    b'{"a":',
    b'","',
    b'":"',
    b'":1,"',
    b'1,"a":1',
    b'","a":"',
    b'{"a":1,"a":',
    b'"},{"',
    b'\\"',
    b'b":1}',
]
VOCABULARY = [*(bytes((byte,)) for byte in range(256)), b"", *PIECES]
DIGIT = {"type": "integer", "minimum": 0, "maximum": 9}
FLAG = {"type": "boolean"}


class Tokens:
    """A tokenizer of bytes and of pieces of JSON with several quotation marks."""

    vocab_size = len(VOCABULARY)
    special_ids = frozenset({EOS})

    def token_bytes(self) -> list[bytes]:
        return VOCABULARY

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, token_ids: Sequence[int]) -> str:
        return b"".join(VOCABULARY[token_id] for token_id in token_ids).decode("utf-8", "replace")


COMPILER = GrammarCompiler(Tokens(), len(VOCABULARY), [EOS])


def allowed(mask: bytes) -> list[int]:
    return [token_id for token_id in range(len(VOCABULARY)) if mask[token_id // 8] >> token_id % 8 & 1]


def drawn(schema: dict[str, Any], draw: random.Random) -> bytes | None:
    """Return a text of random tokens within the masks, with few different keys; None if it does not end."""
    grammar = COMPILER.compile(StructuredOutput(json_schema=schema), [EOS])
    text = b""
    for _ in range(300):
        tokens = allowed(grammar.mask)
        liked = [token_id for token_id in tokens if token_id > EOS or chr(token_id) in '"{},:a1\\t']
        if EOS in tokens and draw.random() < 0.3:
            return text
        token_id = draw.choice(liked if liked and draw.random() < 0.95 else tokens)
        if token_id == EOS:
            return text
        text += VOCABULARY[token_id]
        grammar.advance([token_id])
        assert grammar.error is None
        if grammar.is_complete:
            return text
    return None


SCHEMAS: list[dict[str, Any]] = [
    {"type": "object", "additionalProperties": DIGIT, "minProperties": 2},
    {"type": "object", "additionalProperties": DIGIT, "minProperties": 3, "maxProperties": 4},
    {"type": "object", "additionalProperties": DIGIT, "maxProperties": 1},
    {"type": "object", "properties": {"a": DIGIT}, "required": ["a"], "additionalProperties": FLAG, "minProperties": 3},
    {"type": "object", "properties": {"a": DIGIT, "aa": FLAG}, "additionalProperties": FLAG},
    {"type": "object", "properties": {"a\t": DIGIT, 'a"': FLAG, "\\": DIGIT}, "additionalProperties": FLAG},
    {"type": "object", "patternProperties": {"^a": DIGIT}, "additionalProperties": FLAG},
    {"type": "object", "patternProperties": {"a$": DIGIT}, "additionalProperties": False, "minProperties": 2},
    {"type": "array", "items": {"type": "object", "additionalProperties": DIGIT, "minProperties": 2}, "maxItems": 3},
    {"type": "object", "additionalProperties": {"type": "object", "additionalProperties": DIGIT, "minProperties": 2}},
    {"$ref": "#/$defs/map", "$defs": {"map": {"type": "object", "minProperties": 2, "additionalProperties": DIGIT}}},
    {"allOf": [{"type": "object", "minProperties": 2}, {"additionalProperties": DIGIT}]},
]


def faults(value: Any, schema: dict[str, Any], root: dict[str, Any]) -> Iterator[str]:
    """Return what is wrong with a value by the keywords that `SCHEMAS` use."""
    if "$ref" in schema:
        schema = root["$defs"]["map"]
    for inner in schema.get("allOf", ()):
        yield from faults(value, inner, root)
    if schema.get("type") == "integer" and (isinstance(value, bool) or not isinstance(value, int) or value > 9):
        yield f"{value!r} is no digit"
    if schema.get("type") == "boolean" and not isinstance(value, bool):
        yield f"{value!r} is no bool"
    for item in value if schema.get("type") == "array" else ():
        yield from faults(item, schema["items"], root)
    if not isinstance(value, dict):
        return
    if not schema.get("minProperties", 0) <= len(value) <= schema.get("maxProperties", 10**9):
        yield f"{len(value)} properties"
    for key, item in value.items():
        pattern = next(iter(schema.get("patternProperties", {"^$": None})))
        is_matched = key.startswith("a") if pattern == "^a" else key.endswith("a") if pattern == "a$" else False
        if key in schema.get("properties", {}):
            yield from faults(item, schema["properties"][key], root)
        elif is_matched:
            yield from faults(item, schema["patternProperties"][pattern], root)
        elif schema.get("additionalProperties") is False:
            yield f"{key!r} is not allowed"
        else:
            yield from faults(item, schema.get("additionalProperties", {}), root)


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    assert len(dict(pairs)) == len(pairs), f"{pairs} has a key twice"
    return dict(pairs)


@pytest.mark.parametrize("index", range(len(SCHEMAS)))
def test_random_tokens_satisfy_the_schema(index: int) -> None:
    schema, draw, finished = SCHEMAS[index], random.Random(index), 0
    for _ in range(25):
        text = drawn(schema, draw)
        if text is not None:
            finished += 1
            value = json.loads(text, object_pairs_hook=unique)
            assert not list(faults(value, schema, schema)), text
    assert finished > 5


@pytest.mark.parametrize("text", ['{"\\u0061":true', '{"a":1,"\\u0061":true', '{"x":true,"x"', '{"a":1,"a"'])
def test_a_free_key_neither_overrides_nor_repeats(text: str) -> None:
    schema = {"type": "object", "properties": {"a": DIGIT}, "additionalProperties": FLAG}
    grammar = COMPILER.compile(StructuredOutput(json_schema=schema), [EOS])
    for byte in text.encode():
        if byte not in allowed(grammar.mask):
            return
        assert grammar.num_allowed([byte]) == 1
        grammar.advance([byte])
    pytest.fail(f"{text} was let through")


def test_any_json_has_no_key_twice() -> None:
    draw = random.Random(4)
    texts = [drawn({}, draw) for _ in range(60)]
    assert sum(text is not None and b'":' in text for text in texts) > 10
    for text in texts:
        if text is not None:
            json.loads(text, object_pairs_hook=unique)


def test_several_tokens_at_once_stop_before_a_key_that_is_there() -> None:
    grammar = COMPILER.compile(StructuredOutput(json_schema=SCHEMAS[0]), [EOS])
    text = list(b'{"a":1,"b":2,"a":3}')
    assert grammar.num_allowed(text) == len(b'{"a":1,"b":2,"a')
    grammar.advance(text[:14])
    assert (grammar.error, ord('"') in allowed(grammar.mask), ord("x") in allowed(grammar.mask)) == (None, True, True)
    grammar.advance(text[14:15])
    assert ord('"') not in allowed(grammar.mask)


def test_a_fork_has_keys_of_its_own() -> None:
    first = COMPILER.compile(StructuredOutput(json_schema=SCHEMAS[0]), [EOS])
    first.advance(list(b'{"a":1,'))
    second = COMPILER.compile(StructuredOutput(json_schema=SCHEMAS[0]), [EOS])
    for grammar in (first, second):
        grammar.advance(list(b'"a' if grammar is first else b'{"a'))
    assert ord('"') not in allowed(first.mask)
    assert ord('"') in allowed(second.mask)


def test_where_only_one_key_is_possible_it_may_come_again_unless_it_counts() -> None:
    schema = {"type": "object", "patternProperties": {"^a$": DIGIT}, "additionalProperties": False}
    grammar = COMPILER.compile(StructuredOutput(json_schema=schema), [EOS])
    grammar.advance(list(b'{"a":1,"a":2,"a":3}'))
    assert grammar.error is None
    assert grammar.is_complete
    grammar = COMPILER.compile(StructuredOutput(json_schema={**schema, "minProperties": 2}), [EOS])
    grammar.advance(list(b'{"a":1,"a'))
    assert (
        grammar.error
        == "only a key that the object already has can come next, and minProperties does not count it again"
    )


def test_a_request_without_another_key_fails_alone() -> None:
    text = b'{"a":1,"a":2}'

    def next_token(token_ids: Sequence[int]) -> int:
        return text[len(token_ids) - 1] if len(token_ids) <= len(text) else EOS

    schema = {"type": "object", "patternProperties": {"^a$": DIGIT}, "additionalProperties": False, "minProperties": 2}
    params = SamplingParams(structured=StructuredOutput(json_schema=schema), max_new_tokens=20)
    with LLM.from_backend(lambda: FakeBackend(next_token), tokenizer=ByteTokenizer(), eos_token_ids=[EOS]) as llm:
        output = llm.generate([5], params)[0]
        assert output.finish_reason == "error"
        assert isinstance(output.error, RequestFailedError)
        assert "minProperties does not count it again" in str(output.error)


@pytest.mark.parametrize("value", ["\x01", "a\x1fb", "\x7f"])
def test_control_characters_without_a_short_escape_are_refused(value: str) -> None:
    with pytest.raises(InvalidRequestError, match="has control characters"):
        COMPILER.compile(StructuredOutput(json_schema={"const": value}), [EOS])
    grammar = COMPILER.compile(StructuredOutput(json_schema={"const": "\b\t\n\f\r\\"}), [EOS])
    grammar.advance(list(b'"\\b\\t\\n\\f\\r\\\\"'))
    assert (grammar.error, grammar.is_complete) == (None, True)


def test_an_escape_in_a_pattern_is_no_control_character() -> None:
    grammar = COMPILER.compile(StructuredOutput(json_schema={"type": "string", "pattern": r"^\u0041$"}), [EOS])
    grammar.advance(list(b'"A"'))
    assert (grammar.error, grammar.is_complete) == (None, True)


def test_a_schema_cannot_loosen_its_own_promise() -> None:
    loose = {"x-guidance": {"lenient": True, "json_allowed_escapes": 'nrbtf\\"u'}}
    with pytest.raises(InvalidRequestError, match="uniqueItems"):
        COMPILER.compile(StructuredOutput(json_schema={**loose, "type": "array", "uniqueItems": True}), [EOS])
    grammar = COMPILER.compile(StructuredOutput(json_schema={**loose, "type": "object"}), [EOS])
    grammar.advance(list(b'{"\\'))
    assert ord("u") not in allowed(grammar.mask)


def repeats(value: Any) -> bool:
    """Return whether an object, at any depth, has a key twice."""
    if not isinstance(value, list):
        return False
    keys = [item[0] for item in value if isinstance(item, tuple)]
    return len(set(keys)) < len(keys) or any(repeats(item[1] if isinstance(item, tuple) else item) for item in value)


KEYS = st.sampled_from(["a", "b", "", 'a"', "\\", '"', "a\\", "é"])
JSON = st.recursive(
    st.none() | KEYS | st.integers(0, 9),
    lambda inner: st.lists(inner, max_size=3) | st.lists(st.tuples(KEYS, inner), max_size=3),
    max_leaves=8,
)


def written(value: Any) -> str:
    if isinstance(value, list) and value and isinstance(value[0], tuple):
        return "{" + ", ".join(f"{json.dumps(key, ensure_ascii=False)} : {written(item)}" for key, item in value) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(written, value)) + "]"
    return json.dumps(value, ensure_ascii=False)


@settings(max_examples=300, deadline=None)
@given(value=JSON, cuts=st.lists(st.integers(1, 5), min_size=1, max_size=10))
def test_repeated_keys_are_found_in_any_json_however_it_is_cut(value: Any, cuts: list[int]) -> None:
    text, place, found, begin, index = written(value).encode(), KeyTracker(), False, 0, 0
    while begin < len(text):
        size = cuts[index % len(cuts)]
        piece = text[begin : begin + size]
        vocabulary = [bytes((byte,)) for byte in range(256)] + [piece]
        quotes = QuoteTokens(vocabulary.__getitem__, len(vocabulary))
        place, ruled_out = place.after(piece), 256 in place.repeating_tokens(quotes)
        if b'"' in piece:
            assert ruled_out == place.repeats
        found, begin, index = found or place.repeats, begin + size, index + 1
    assert found == repeats(json.loads(text, object_pairs_hook=lambda pairs: pairs))
