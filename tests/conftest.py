"""Fixtures shared by several test packages."""

import pytest
from hypothesis import settings

from tests.processes import Gang
from tests.tiny import write_dataset

settings.register_profile("patient", deadline=None)  # examples are slow on a busy machine
settings.load_profile("patient")


@pytest.fixture(scope="session")
def dataset(tmp_path_factory):
    """A tiny prepared data set. Tests must not write to it."""
    return write_dataset(tmp_path_factory.mktemp("data") / "tiny")


@pytest.fixture(scope="session")
def gang():
    """Four processes for distributed tests; see tests/processes.py."""
    gang = Gang(4)
    yield gang
    gang.stop()
