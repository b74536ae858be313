"""Fixtures that several test files share."""

import pytest
from hypothesis import settings

from edgelab.build import guest_path
from edgelab.runtime import Guest

settings.register_profile("edgelab", deadline=None)  # a busy machine is no failure
settings.load_profile("edgelab")


@pytest.fixture(scope="session")
def classify_guest() -> Guest:
    return Guest(guest_path("classify").path)
