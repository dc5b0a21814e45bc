"""Tokens that are known to end an answer, even in a model whose files do not say so.

Many files name only the base model's end of text, while the chat template ends turns with another token; examples are
fine-tunes of Llama 3 and ChatML models, Phi-3 and Gemma. llama.cpp therefore recognises end tokens by their text. The
names, and the models that use one of them for something else, are those of its vocabulary loader.
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence

from llmengine.errors import ConfigError

END_TOKENS = frozenset(
    {
        *("<|eot_id|>", "<|eom_id|>", "<|end_of_text|>"),  # Llama 3, Granite
        *("<|im_end|>", "<|endoftext|>"),  # ChatML, GPT-2
        *("<|end|>", "<|return|>", "<|call|>", "<|calls|>", "<|flush|>"),  # Phi-3, gpt-oss, Solar
        *("<end_of_turn>", "<eos>", "<turn|>", "<|tool_response>"),  # Gemma
        *("<EOT>", "_<EOT>", "\u2581<EOT>", "[EOT]", "[EOS]"),  # Code Llama, Kimi
        *("<end_of_utterance>", "</s>"),  # SmolVLM, Llama 2
    }
)
"""Texts of tokens that end a text, a turn or a message."""

FILL_IN_END_TOKENS = frozenset(
    {
        *("<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]"),
        *("<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>"),
        "<|file_sep|>",
    }
)
"""Texts of tokens after which a code model continues with another file. llama.cpp ends there, transformers does not."""

_GGUF_CONTROL = 3


def known_end_ids(token_ids: Mapping[str, int], special: Container[str]) -> frozenset[int]:
    """Ids of the tokens that end an answer, from `token_ids`, which maps tokens of `END_TOKENS` to ids.

    `special` has those that are never ordinary text: "</s>" is an HTML tag in Gemma's vocabulary.
    """
    ends = dict(token_ids)
    calls = ends.keys() & {"<|call|>", "<|calls|>"}
    if calls and ends.keys() & {"<|return|>", "<|flush|>"}:
        ends.pop("<|end|>", None)  # there it ends a message, and the answer continues
    if "</s>" not in special or "<|tool_response>" in ends:
        ends.pop("</s>", None)
    return frozenset(ends.values())


def gguf_known_end_ids(tokens: Sequence[object], types: Sequence[object] | None) -> frozenset[int]:
    """Ids of the tokens in a GGUF file whose text ends an answer, whatever their type."""
    names = END_TOKENS | FILL_IN_END_TOKENS
    found = {token: token_id for token_id, token in enumerate(tokens) if isinstance(token, str) and token in names}
    special = [token for token, token_id in found.items() if types is None or types[token_id] == _GGUF_CONTROL]
    return known_end_ids(found, special)


def tokenizer_end_ids(tokenizer: object, vocab_size: int) -> frozenset[int]:
    """Ids that end an answer according to a tokenizer; see `llmengine.tokenizer.protocol.Tokenizer`.

    The ids that it names are its `end_token_ids`, or its `eos_token_id` without such an attribute. Raises
    `ConfigError` for one of them outside [0, vocab_size). Its `known_end_ids` are known by their text only, so those
    outside the vocabulary are ignored.
    """
    named = getattr(tokenizer, "end_token_ids", None)
    if named is None:
        eos = getattr(tokenizer, "eos_token_id", None)
        named = () if eos is None else (eos,)
    for token_id in named:
        if not 0 <= token_id < vocab_size:
            raise ConfigError(
                f"the tokenizer's end token id {token_id} is outside the model's vocabulary [0, {vocab_size}); "
                "pass the tokenizer of this model"
            )
    known = getattr(tokenizer, "known_end_ids", ())
    return frozenset(named).union(token_id for token_id in known if token_id < vocab_size)
