"""Test the file of rows to which several commands add."""

import json
from operator import itemgetter

import pytest

from studies import rows
from studies.rows import add_rows, load_rows, write_rows

KEY = itemgetter("name")
HEADER = {"steps": 5}


@pytest.fixture
def add(tmp_path, monkeypatch):
    """Return a function that adds rows to a file without a pool."""
    monkeypatch.setattr(rows, "iterate_in_pool", lambda measure, keys, _: map(measure, keys))

    def added(measure, keys, header=HEADER):
        return add_rows(tmp_path / "file.json", measure, keys, KEY, workers=1, header=header)

    return added


def row(name):
    return {"name": name, "value": len(name)}


def test_rows_are_added_and_those_with_the_same_key_replaced(add):
    add(row, ["a", "b"])
    found = add(lambda name: row(name) | {"value": 9}, ["b", "c"])
    assert [(each["name"], each["value"]) for each in found] == [("a", 1), ("b", 9), ("c", 9)]
    assert add(row, []) == found


def test_rows_that_another_command_adds_meanwhile_are_kept(add, tmp_path):
    def measure(name):
        write_rows(tmp_path / "file.json", [row("other")], KEY, HEADER)
        return row(name)

    assert [each["name"] for each in add(measure, ["mine"])] == ["other", "mine"]


def test_rows_of_other_settings_are_refused_before_any_work_and_kept(add, tmp_path):
    add(row, ["a"])
    before = (tmp_path / "file.json").read_bytes()
    with pytest.raises(ValueError, match="holds rows of another steps; use another --out"):
        add(pytest.fail, ["b"], {"steps": 6})
    assert (tmp_path / "file.json").read_bytes() == before


def test_a_dict_of_the_header_may_gain_entries_but_not_lose_or_change_them(add):
    add(row, ["a"], {"modes": {"base": 1}})
    add(row, ["b"], {"modes": {"base": 1, "fast": 2}})
    for modes in ({"base": 1}, {"base": 3, "fast": 2}):
        with pytest.raises(ValueError, match="rows of another modes"):
            add(pytest.fail, ["c"], {"modes": modes})


@pytest.mark.parametrize("content", ["{", "[]", '{"runs": []}', '{"rows": [{"id": 1}]}'])
def test_a_file_of_another_kind_is_named(tmp_path, content):
    path = tmp_path / "file.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"file\.json does not hold the rows of this study"):
        load_rows(path, KEY)
    assert path.read_text() == content


def test_no_file_has_no_rows(tmp_path):
    assert load_rows(tmp_path / "missing.json", KEY) == {}


def test_the_file_is_json_with_the_header_beside_the_rows(add, tmp_path):
    add(row, ["a"])
    assert json.loads((tmp_path / "file.json").read_text()) == HEADER | {"rows": [row("a")]}
