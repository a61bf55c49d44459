"""Fixtures that several parts share."""

import pytest

from tests.processes import Gang
from tests.tiny import write_dataset


@pytest.fixture(scope="session")
def dataset(tmp_path_factory):
    """A tiny prepared data set; nobody writes to it."""
    return write_dataset(tmp_path_factory.mktemp("data") / "tiny")


@pytest.fixture(scope="session")
def gang():
    """Four processes for tests of several; see tests/processes.py."""
    gang = Gang(4)
    yield gang
    gang.stop()
