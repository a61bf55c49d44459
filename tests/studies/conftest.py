"""Provide the fixtures that write reports and run studies in this process."""

import pytest

from studies.report.__main__ import main
from tests.studies.pages import Page, read
from tests.studies.synchronous import SynchronousExecutor, synchronous_pool


@pytest.fixture
def synchronous(monkeypatch):
    """Start neither processes nor threads for the runs of a study.

    Threads would run trials at the same time, which redirect the output of the whole process.
    """
    monkeypatch.setattr("studies.sweep.runner.worker_pool", synchronous_pool)
    monkeypatch.setattr("studies.sweep.study.ThreadPoolExecutor", SynchronousExecutor)


@pytest.fixture
def report(tmp_path, monkeypatch):
    """Return a function that writes a report of folders, without figures, and reads it back."""
    monkeypatch.setattr("studies.report.report.draw", lambda records: {})

    def make(*folders) -> Page:
        assert main([*map(str, folders), "--out", str(tmp_path / "out")]) == 0
        return read(tmp_path / "out")

    return make
