"""Test that the committed tables of the width studies match the committed records."""

from pathlib import Path

import pytest

from data.schema import OpenSchema
from studies.mup import coord_check, tables
from studies.mup.grid import twins
from studies.stats.records import RECORDS, read_records

RESULTS = Path(__file__).parents[3] / "studies" / "results" / "mup"
PAGES = sorted(RESULTS.glob("*/*.md"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.parent.name)
def test_the_committed_tables_match_the_committed_records(page):
    records = read_records(page.parent / RECORDS, OpenSchema)
    records += twins(records)
    is_check = page.stem == "coordinates"
    text = coord_check.tables(records)[1] if is_check else tables.tables(records)
    assert page.read_text().endswith(f"\n\n{text}\n")
