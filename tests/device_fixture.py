"""The fixture `device`: tests run on the GPU where there is one, else through Triton's interpreter."""

import functools
import os
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported


@functools.cache
def quicken_interpreter() -> None:
    """Save Triton's interpreter a third of its time.

    The interpreter replaces the builtins of triton.language for the duration of a launch, and searches for more of them
    in each call of a device function. This skips the searches that can find none.
    """
    from triton.runtime import interpreter

    if not hasattr(interpreter, "_LangPatchScope"):
        return
    language, patch = interpreter.tl, interpreter._patch_lang
    patched: set[ModuleType] = set()  # in the launch that runs

    @functools.cache
    def languages(function: Callable[..., Any]) -> frozenset[ModuleType]:
        return frozenset(
            value for value in function.__globals__.values() if value is language or value is language.core
        )

    def patch_new(function: Callable[..., Any]) -> Any:
        new = languages(function) - patched
        scope = patch(function) if new else interpreter._LangPatchScope()
        patched.update(new)
        restore = scope.restore

        def restore_all() -> None:
            restore()
            patched.clear()

        scope.restore = restore_all
        return scope

    interpreter._patch_lang = patch_new


@pytest.fixture(scope="session")
def device() -> str:
    if torch.cuda.is_available():
        return "cuda"
    quicken_interpreter()
    return "cpu"
