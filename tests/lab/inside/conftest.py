"""What the tests inside a lab host share. They run there with pyhv's wheel; see ../README.md."""

from __future__ import annotations

import os

import pytest


@pytest.fixture(scope="session")
def vendor() -> str:
    """The host's vendor, "amd" or "intel"."""
    return os.environ["PYHV_LAB_VENDOR"]


@pytest.fixture(scope="session")
def kind() -> str:
    """The host's kind, such as "intel-penryn"."""
    return os.environ["PYHV_LAB_KIND"]
