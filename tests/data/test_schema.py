"""JSON files are checked against a schema, and every problem is one readable line."""

import json

import pytest

from data.schema import OpenSchema, Schema, parse_json, read_json, read_json_lines
from data.shards import DataError


class Point(Schema):
    x: int
    tags: list[str]


class OpenPoint(OpenSchema):
    x: int


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "EOF"),
        (b"[1]", "Input should be an object"),
        (b"[" * 100_000, "recursion limit"),
        (b"\xff\xfe", "Invalid JSON"),
        (b'{"x": 1.0, "tags": []}', r"x: .*integer \(found 1.0\)"),
        (b'{"x": true, "tags": []}', r"x: .*integer \(found True\)"),
        (b'{"x": "1", "tags": []}', "x: .*integer"),
        (b'{"x": 1}', "tags: Field required"),
        (b'{"x": 1, "tags": [], "y": 2}', "y: Extra inputs"),
        (b'{"x": null, "tags": [3]}', "x: .*; tags.0: .*string"),
    ],
)
def test_a_file_that_does_not_fit_is_refused_by_name_and_key(tmp_path, content, problem):
    path = tmp_path / "point.json"
    path.write_bytes(content)
    with pytest.raises(DataError, match=problem) as caught:
        read_json(path, Point)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_only_an_open_schema_ignores_unknown_keys():
    assert parse_json('{"x": 1, "y": 2}', "here", OpenPoint).x == 1


def test_the_caller_chooses_the_error(tmp_path):
    with pytest.raises(ZeroDivisionError, match="cannot be read"):
        read_json(tmp_path / "absent.json", Point, ZeroDivisionError)


def test_a_bad_line_is_named_by_its_number(tmp_path):
    path = tmp_path / "points.jsonl"
    path.write_text(json.dumps({"x": 1, "tags": []}) + "\n\n{}\n")
    lines = read_json_lines(path, Point)
    assert next(lines)[0] == 1
    with pytest.raises(DataError, match="line 3"):
        next(lines)
