"""Fixtures that several parts share."""

import pytest
from hypothesis import settings

from tests.processes import Gang
from tests.tiny import write_dataset

settings.register_profile("patient", deadline=None)  # a busy machine is slow
settings.load_profile("patient")


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
