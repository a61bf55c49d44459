"""Files of every format are read; bad rows are skipped, and damaged files are named."""

import bz2
import gzip
import json
import lzma

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data.readers import Skipped, documents_in, read_text
from data.shards import DataError

TEXTS = ["first\nwith two lines", "second é", *[f"document {i}" for i in range(20)]]
SEPARATOR = {"csv": ",", "tsv": "\t"}


def write_rows(folder, suffix, column="text"):
    path = folder / f"rows.{suffix}"
    ending = suffix.lower()
    if ending == "parquet":
        pq.write_table(pa.table({"id": range(len(TEXTS)), column: TEXTS}), path)
    elif ending in SEPARATOR:
        rows = [("id", column), *enumerate(TEXTS)]
        lines = [f'{key}{SEPARATOR[ending]}"{text}"\n' for key, text in rows]
        path.write_text("".join(lines), encoding="utf-8")
    elif ending == "json":
        path.write_text(json.dumps([{column: text} for text in TEXTS]), encoding="utf-8")
    else:
        lines = [json.dumps({column: text}) + "\n" for text in TEXTS]
        path.write_text("".join(lines), encoding="utf-8")
    return path


def zstd(content):
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return sink.getvalue().to_pybytes()


@pytest.mark.parametrize("suffix", ["jsonl", "json", "ndjson", "JSONL", "parquet", "csv", "TSV"])
def test_the_rows_of_a_table_are_documents(tmp_path, suffix):
    assert list(documents_in(write_rows(tmp_path, suffix), "text")) == TEXTS


@pytest.mark.parametrize(("ending", "compress"), [("gz", gzip.compress), ("zst", zstd)])
@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv"])
def test_compressed_tables_are_read(tmp_path, suffix, ending, compress):
    path = tmp_path / f"rows.{suffix}.{ending}"
    path.write_bytes(compress(write_rows(tmp_path, suffix).read_bytes()))
    assert list(documents_in(path, "text")) == TEXTS


@pytest.mark.parametrize("compress", [gzip.compress, zstd])
def test_compressed_texts_are_recognized_by_their_content(tmp_path, compress):
    (tmp_path / "a").write_bytes(compress(b"one") + compress(b" two"))
    assert read_text(tmp_path / "a") == "one two"
    (tmp_path / "a").write_bytes(compress(b"one")[:-3])
    with pytest.raises(DataError, match="a: cannot be read"):
        read_text(tmp_path / "a")


def test_json_lines_may_begin_with_a_byte_order_mark(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "one"}\n')
    assert list(documents_in(tmp_path / "a.jsonl", "text")) == ["one"]


def test_every_value_of_a_csv_file_is_text(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("id,text\n1,NA\n2,null\n3,12\n", encoding="utf-8")
    assert list(documents_in(path, "text")) == ["NA", "null", "12"]


@pytest.mark.parametrize("end", ["", "\n"])
def test_text_after_a_quote_belongs_to_its_field(tmp_path, end):
    path = tmp_path / "a.csv"
    path.write_text(f'text,id\n"one" two,1\n"a\nb",2\n"three" ,3{end}', encoding="utf-8")
    assert list(documents_in(path, "text")) == ["one two", "a\nb", "three "]


def test_a_quote_that_does_not_end_is_named(tmp_path):
    (tmp_path / "a.csv").write_text('text,b\nx,1\n"abc,2\nfoo,1\n', encoding="utf-8")
    with pytest.raises(DataError, match=r"a\.csv: .*the quote in the row of line 3 does not end"):
        list(documents_in(tmp_path / "a.csv", "text"))


def test_other_columns_do_not_matter(tmp_path):
    rows = [{"text": "a", "meta": None}] * 3 + [{"text": "a", "meta": {"b": [1, "c"]}}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    assert list(documents_in(tmp_path / "a.jsonl", "text")) == ["a"] * 4


BAD_ROWS = {
    "a.jsonl": b'{"text": "a"}\n{"text": null}\n{"no": 1}\nno json\n[1]\n{"text": 3}\n'
    + b"[" * 9999,
    "a.json": b'[{"text": "a"}, {"text": null}, 3, "b"]',
    "a.csv": b"id,text\n1,a\n2\n3,\xff\n",
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_rows_without_text_are_skipped_with_their_place(tmp_path, name):
    (tmp_path / name).write_bytes(BAD_ROWS[name])
    first, *others = documents_in(tmp_path / name, "text")
    assert first == "a"
    assert len(others) >= 2
    assert all(isinstance(other, Skipped) and name in other.where for other in others)


def test_bad_rows_of_a_parquet_file_are_skipped(tmp_path):
    text = pa.array([b"a", None, b"\xff"], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"text": text, "other": [1, 2, 3]}), tmp_path / "a.parquet")
    first, null, broken = documents_in(tmp_path / "a.parquet", "text")
    assert first == "a"
    assert (null.reason, broken.reason) == ("row without text in column 'text'", "not UTF-8")


def test_text_that_parquet_stores_as_a_dictionary_is_read(tmp_path):
    table = pa.table({"text": pa.array(["a", "b", "a"]).dictionary_encode()})
    pq.write_table(table, tmp_path / "a.parquet")
    assert list(documents_in(tmp_path / "a.parquet", "text")) == ["a", "b", "a"]


@pytest.mark.parametrize("suffix", ["jsonl", "parquet", "csv"])
def test_a_wrong_column_is_refused_and_the_columns_are_named(tmp_path, suffix):
    path = write_rows(tmp_path, suffix, column="content")
    assert list(documents_in(path, "content")) == TEXTS
    with pytest.raises(DataError, match=r"rows\.\w+: column 'text' does not exist.* content"):
        list(documents_in(path, "text"))


def test_a_column_of_numbers_is_refused(tmp_path):
    path = write_rows(tmp_path, "parquet")
    with pytest.raises(DataError, match=r"column 'id' holds int, not text"):
        list(documents_in(path, "id"))


def test_a_json_file_that_is_no_table_is_refused_with_the_remedy(tmp_path):
    path = tmp_path / "package.json"
    path.write_text(json.dumps({"name": "x", "version": 1}, indent=2), encoding="utf-8")
    with pytest.raises(DataError, match=r"package\.json: expected JSON objects.*--exclude"):
        list(documents_in(path, "text"))


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.tsv"])
def test_a_table_without_rows_is_skipped(tmp_path, name):
    (tmp_path / name).touch()
    assert list(documents_in(tmp_path / name, "text")) == [
        Skipped(str(tmp_path / name), "table without rows")
    ]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.parquet", b"PAR1" + b"x" * 100),
        ("a.json", b'[{"text": "a"'),
        ("a.json", b"[" * 100_000),
        ("a.jsonl", b"\x1f\x8b not gzip"),
        ("a.csv", b"\x28\xb5\x2f\xfd not zstd"),
        ("a.csv", b'text,b\n"abc,2\nfoo,1\n'),  # a quote that does not end
    ],
)
def test_a_damaged_file_is_named(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=f"{name}: cannot be read"):
        list(documents_in(tmp_path / name, "text"))


def test_a_text_that_is_not_utf8_or_empty_is_refused_with_its_place(tmp_path):
    (tmp_path / "a").write_bytes(b"ab\xff")
    with pytest.raises(DataError, match="a, byte 2: not UTF-8"):
        read_text(tmp_path / "a")
    (tmp_path / "a").write_bytes(b"")
    with pytest.raises(DataError, match="a: empty text"):
        read_text(tmp_path / "a")


def test_a_line_that_is_not_json_is_reported_as_such_with_the_reason(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\n{"text": \n', encoding="utf-8")
    _, broken = documents_in(path, "text")
    assert (broken.where, broken.reason) == (f"{path}, line 2", "not JSON")
    assert "EOF while parsing" in str(broken)
    path.write_text('{"text": \n', encoding="utf-8")
    with pytest.raises(DataError, match=r"line 1 is not JSON \(EOF while parsing"):
        list(documents_in(path, "text"))


@pytest.mark.parametrize("empty", ["", " \n\t"])
def test_empty_rows_and_files_are_skipped_and_counted(tmp_path, empty):
    table = [{"text": "a"}, {"text": empty}]
    (tmp_path / "a.json").write_text(json.dumps(table), encoding="utf-8")
    pq.write_table(pa.Table.from_pylist(table), tmp_path / "a.parquet")
    (tmp_path / "a.txt").write_text(empty, encoding="utf-8")
    for name in ("a.json", "a.parquet", "a.txt"):
        *_, last = documents_in(tmp_path / name, "text")
        assert last.reason == "empty text"
        assert name in last.where


@pytest.mark.parametrize(("name", "compress"), [("xz", lzma.compress), ("bzip2", bz2.compress)])
def test_a_compression_that_is_not_read_is_named(tmp_path, name, compress):
    path = tmp_path / "a.jsonl.x"
    path.write_bytes(compress(b"one"))
    with pytest.raises(DataError, match=f"compressed with {name}.*gzip and zstd"):
        read_text(path)
    assert name in next(documents_in(path, "text")).reason


def test_a_text_may_begin_with_a_byte_order_mark(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfhello")
    assert read_text(tmp_path / "a.txt") == "hello"
