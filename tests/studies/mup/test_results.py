"""The committed tables of the width studies are those of the committed records."""

from pathlib import Path

import pytest

from studies.mup import coord_check, tables
from studies.mup.grid import twins
from studies.stats.records import RECORDS, read_records

RESULTS = Path(__file__).parents[3] / "studies" / "results" / "mup"
PAGES = sorted(RESULTS.glob("*/*.md"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.parent.name)
def test_committed_tables_are_those_of_the_committed_records(page):
    records = read_records(page.parent / RECORDS)
    records += twins(records)
    made = {"coordinates": lambda: coord_check.tables(records)[1]}
    made["transfer"] = lambda: tables.tables(records)
    assert page.read_text().endswith(f"\n\n{made[page.stem]()}\n")
