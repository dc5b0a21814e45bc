"""Messages for rows of a step that fail alone, see `StepResult.errors`."""

from __future__ import annotations


def no_token_message(position: int) -> str:
    """Message for a row whose logits allow no token at `position`."""
    return (
        f"the model's logits for the token at position {position} are not finite, "
        "or the request's parameters forbid every token"
    )
