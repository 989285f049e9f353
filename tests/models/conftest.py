"""What tests of several networks share."""

from collections.abc import Iterator

import pytest
from jaxtyping import config


@pytest.fixture
def untyped() -> Iterator[None]:
    """Run without the types that the other tests check, as a user does."""
    config.update("jaxtyping_disable", True)
    yield
    config.update("jaxtyping_disable", False)
