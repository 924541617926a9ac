"""What tests of kernels share."""

from __future__ import annotations

import pytest

from groundling.kernels import products


@pytest.fixture(scope="session", autouse=True)
def permission() -> None:
    """Linux lets a process use the matrix unit once it has asked for it."""
    products.available()
