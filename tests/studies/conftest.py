"""Provide the fixture that writes reports."""

import pytest

from studies.report.__main__ import main
from tests.studies.pages import Page, read


@pytest.fixture
def report(tmp_path, monkeypatch):
    """Return a function that writes a report of folders, without figures, and reads it back."""
    monkeypatch.setattr("studies.report.report.draw", lambda records: {})

    def make(*folders) -> Page:
        assert main([*map(str, folders), "--out", str(tmp_path / "out")]) == 0
        return read(tmp_path / "out")

    return make
