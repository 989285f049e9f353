"""Fixtures of the tests of networks."""

from collections.abc import Iterator

import pytest
from jaxtyping import config


@pytest.fixture
def untyped() -> Iterator[None]:
    """Turn the shape checks of the annotations off, as in a normal run."""
    config.update("jaxtyping_disable", True)
    yield
    config.update("jaxtyping_disable", False)
