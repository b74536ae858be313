"""Fixtures that several test files share."""

import os

import pytest
from hypothesis import settings

from edgelab.build import guest_path
from edgelab.paths import source_root
from edgelab.runtime import Guest
from edgelab.toolchain import Toolchain, find

settings.register_profile("edgelab", deadline=None)  # a busy machine is no failure
settings.load_profile("edgelab")

LONG = ("test_tract.py", "test_lessons.py", "test_rivals.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the longest files: a worker takes a whole one, and none should wait at the end."""
    items.sort(key=lambda item: LONG.index(item.path.name) if item.path.name in LONG else len(LONG))


@pytest.fixture(scope="session")
def classify_guest() -> Guest:
    return Guest(guest_path("classify").path)


@pytest.fixture(scope="session")
def rust() -> Toolchain:
    """A Rust that can build the guests. Readers may have none; CI must."""
    root = source_root()
    assert root is not None, "the tests belong to a checkout"
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("EDGELAB_TOOLCHAIN", raising=False)
        found = find(root / "guest")
    if found.kind == "prebuilt":
        why = "; ".join(f"{kind}: {reason.split('. Cure')[0]}" for kind, reason in found.tried)
        if os.environ.get("CI"):
            pytest.fail(f"CI builds the guests from source, and there is no Rust. {why}")
        pytest.skip(f"needs a Rust for wasm32-wasip1, and there is none ({why})")
    return found
