"""Fixtures that several parts share."""

import pytest

from tests.tiny import write_dataset


@pytest.fixture(scope="session")
def dataset(tmp_path_factory):
    """A tiny prepared data set; nobody writes to it."""
    return write_dataset(tmp_path_factory.mktemp("data") / "tiny")
