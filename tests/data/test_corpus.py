"""Documents are read from local files and from the hub."""

import json
import time

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data.corpus import hub_corpus, local_corpus, one_text_corpus
from data.shards import DataError

TEXTS = ["first\nwith two lines", "", "second é", *[f"document {i}" for i in range(20)]]


def write_rows(folder, suffix, column="text"):
    path = folder / f"rows.{suffix}"
    if suffix == "parquet":
        pq.write_table(pa.table({"id": range(len(TEXTS)), column: TEXTS}), path)
    else:
        path.write_text("".join(json.dumps({column: text}) + "\n" for text in TEXTS))
    return path


@pytest.mark.parametrize("suffix", ["jsonl", "json", "parquet"])
def test_rows_of_a_table_are_documents_from_any_start(suffix, tmp_path):
    path = write_rows(tmp_path, suffix)
    for place in (path, tmp_path):
        corpus = local_corpus(place)
        assert list(corpus.documents(0)) == TEXTS
        assert list(corpus.documents(7)) == TEXTS[7:]


def test_rows_of_a_csv_file_are_documents(tmp_path):
    (tmp_path / "rows.csv").write_text('id,text\n1,"a, b\nc"\n2,d\n')
    assert list(local_corpus(tmp_path).documents(0)) == ["a, b\nc", "d"]


def test_other_files_are_one_document_each_in_the_order_of_their_names(tmp_path):
    for name, text in {"b.txt": b"two\r\nlines", "a/z.md": b"one", ".git/x": b"hidden"}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(text)
    corpus = local_corpus(tmp_path)
    assert list(corpus.documents(0)) == [b"one", b"two\r\nlines"]
    assert list(corpus.documents(1)) == [b"two\r\nlines"]


def test_the_column_can_be_chosen_and_a_wrong_one_is_named(tmp_path):
    path = write_rows(tmp_path, "parquet", column="content")
    assert list(local_corpus(path, column="content").documents(0)) == TEXTS
    with pytest.raises(DataError, match=r"column 'text' .* columns are: id, content"):
        list(local_corpus(path).documents(0))


def test_a_path_without_text_is_named(tmp_path):
    with pytest.raises(DataError, match="absent: no such file or folder"):
        local_corpus(tmp_path / "absent")
    with pytest.raises(DataError, match="holds no files"):
        local_corpus(tmp_path)


def test_one_text_that_is_not_utf8_is_named():
    corpus = one_text_corpus({"local": "my.txt"}, lambda: b"ab\xff", 0.5)
    with pytest.raises(DataError, match=r"my\.txt.* not UTF-8 from byte 2"):
        corpus.documents(0)


@pytest.mark.usefixtures("offline")
def test_without_a_network_the_hub_fails_quickly_with_the_remedy():
    start = time.monotonic()
    with pytest.raises(DataError, match=r"some/set.* does not answer.*--local"):
        hub_corpus("some/set").documents(0)
    assert time.monotonic() - start < 1


def test_a_hub_switched_off_fails_at_once_with_the_remedy(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(DataError, match="HF_HUB_OFFLINE forbids it"):
        hub_corpus("some/set").documents(0)


def test_a_folder_that_changed_is_another_corpus(tmp_path):
    (tmp_path / "a.txt").write_text("one")
    before = local_corpus(tmp_path).source
    assert local_corpus(tmp_path).source == before
    (tmp_path / "b.txt").write_text("two")
    assert local_corpus(tmp_path).source != before
