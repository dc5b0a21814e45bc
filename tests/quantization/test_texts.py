"""The texts that come with the package: enough of them, and nothing of the evaluation's in the calibration's."""

from __future__ import annotations

import json
from importlib import resources

from llmengine.quantization.evaluation import evaluation_text

TEXTS = resources.files("llmengine.quantization").joinpath("texts")


def read(name: str) -> str:
    return TEXTS.joinpath(name).read_text(encoding="utf-8")


def test_calibration_has_128_samples_of_512_tokens() -> None:
    """Of any tokenizer that has less than five characters a token."""
    assert len(read("calibration.txt")) > 128 * 512 * 5


def test_evaluation_and_calibration_share_nothing() -> None:
    calibration = read("calibration.txt") + read("calibration_chats.jsonl")
    paragraphs = [line for line in evaluation_text().splitlines() if len(line) > 80]
    assert len(paragraphs) > 200
    assert not [line for line in paragraphs if line in calibration]


def test_chats_are_turns_of_user_and_assistant() -> None:
    chats = [json.loads(line) for line in read("calibration_chats.jsonl").splitlines()]
    assert len(chats) >= 60
    for messages in chats:
        assert [message["role"] for message in messages] == ["user", "assistant"] * 2
        assert all(message["content"].strip() for message in messages)


def test_every_file_names_its_licence() -> None:
    readme = read("README.md")
    for file in TEXTS.iterdir():
        assert file.name == "README.md" or f"`{file.name}`" in readme
    assert "CC0 1.0" in readme
    assert "Apache License 2.0" in readme
