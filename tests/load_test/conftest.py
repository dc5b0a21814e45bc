"""An endpoint to drive."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.load_test.fake_endpoint import FakeEndpoint, running_endpoint


@pytest.fixture
def endpoint() -> Iterator[FakeEndpoint]:
    """A fake OpenAI endpoint on 127.0.0.1."""
    with running_endpoint() as endpoint:
        yield endpoint
