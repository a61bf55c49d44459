"""A report of studies and runs on disk."""

import pytest

from studies.report.__main__ import main
from tests.studies.pages import Page, read


@pytest.fixture
def report(tmp_path, monkeypatch):
    """A report of these folders without figures, which take most of its time."""
    monkeypatch.setattr("studies.report.report.draw", lambda records: {})

    def make(*folders) -> Page:
        assert main([*map(str, folders), "--out", str(tmp_path / "out")]) == 0
        return read(tmp_path / "out")

    return make
