"""Documents are collected from local files and from the hub."""

import time

import pytest

import data.hub
from data.corpus import local_corpus, one_text_corpus
from data.hub import hub_corpus
from data.readers import Skipped
from data.shards import DataError


def write(folder, **texts):
    for name, text in texts.items():
        path = folder / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")


def documents(path, **settings):
    return list(local_corpus(path, **settings).documents(0))


def test_other_files_are_one_document_each_in_the_order_of_their_names(tmp_path):
    for name, text in {"b.txt": b"two\r\nlines", "a/z.md": b"one", ".git/x": b"hidden"}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(text)
    corpus = local_corpus(tmp_path)
    assert list(corpus.documents(0)) == ["one", "two\r\nlines"]
    assert list(corpus.documents(1)) == ["two\r\nlines"]


def test_linked_folders_are_read_once(tmp_path):
    write(tmp_path, outside__b="outside", root__z__a="inside")
    (tmp_path / "root" / "a_link").symlink_to(tmp_path / "root" / "z")
    (tmp_path / "root" / "z" / "loop").symlink_to(tmp_path / "root")
    (tmp_path / "root" / "first").symlink_to(tmp_path / "outside")
    (tmp_path / "root" / "second").symlink_to(tmp_path / "outside")
    assert documents(tmp_path / "root") == ["outside", "inside"]


def test_patterns_choose_files_and_folders(tmp_path):
    write(tmp_path, **{"a.py": "a", "b__c.py": "c", "b__package.json": "{}", "skip__d.py": "d"})
    assert documents(tmp_path, include=["*.py"]) == ["a", "c", "d"]
    assert documents(tmp_path, include=["*.py"], exclude=["skip"]) == ["a", "c"]
    assert documents(tmp_path, exclude=["*.json", "skip/d.py"]) == ["a", "c"]
    with pytest.raises(DataError, match=r"holds no files that match include=\['\*\.md'\]"):
        local_corpus(tmp_path, include=["*.md"])


def test_patterns_are_part_of_the_source_only_if_given(tmp_path):
    write(tmp_path, a="one")
    assert local_corpus(tmp_path).source.keys() == {"local", "files", "column"}
    assert local_corpus(tmp_path, exclude=["b"]).source["exclude"] == ["b"]


def test_the_prepared_data_is_not_read(tmp_path):
    write(tmp_path, **{"a": "one", "prepared__b": "own", "prepared2__c": "two"})
    assert documents(tmp_path, out=tmp_path / "prepared") == ["one", "two"]
    assert documents(tmp_path / "prepared", out=tmp_path) == ["own"]
    with pytest.raises(DataError, match="is the folder of the prepared data"):
        local_corpus(tmp_path, out=tmp_path)


def test_a_path_without_text_is_named(tmp_path):
    with pytest.raises(DataError, match="absent: no such file or folder"):
        local_corpus(tmp_path / "absent")
    with pytest.raises(DataError, match="holds no files"):
        local_corpus(tmp_path)
    with pytest.raises(ValueError, match="path '': expected the name"):
        local_corpus("")


def test_a_name_that_is_not_utf8_can_be_stored(tmp_path):
    (tmp_path / "\udcff").mkdir()
    write(tmp_path / "\udcff", a="one")
    corpus = local_corpus(tmp_path / "\udcff")
    assert corpus.source["local"].encode().endswith(b"\\xff")
    assert len(list(corpus.documents(0))) == 1


def test_one_text_is_cut_in_two():
    corpus = one_text_corpus({}, lambda: "abcd", 0.25)
    assert list(corpus.documents(0)) == ["abc", "d"]
    assert list(corpus.documents(1)) == ["d"]


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


def test_rows_of_the_hub_are_documents_from_any_start(tmp_path, monkeypatch):
    monkeypatch.setattr(data.hub, "_require_hub", lambda path: None)
    lines = [f'{{"text": "row {i}"}}\n' for i in range(9)]
    (tmp_path / "train.jsonl").write_text("".join(lines) + '{"text": null}\n', encoding="utf-8")
    *texts, last = hub_corpus(str(tmp_path)).documents(7)
    assert texts == ["row 7", "row 8"]
    assert isinstance(last, Skipped)


def test_a_connection_that_breaks_is_one_error_with_the_remedy(monkeypatch):
    class Broken:
        def skip(self, n):
            yield {"text": "first"}
            raise RuntimeError("reset by peer")

    monkeypatch.setattr(data.hub, "_require_hub", lambda path: None)
    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: Broken())
    with pytest.raises(DataError, match=r"'some/set': RuntimeError: reset by peer; run the same"):
        list(hub_corpus("some/set").documents(0))


def test_a_folder_that_changed_is_another_corpus(tmp_path):
    write(tmp_path, **{"a.txt": "one"})
    before = local_corpus(tmp_path).source
    assert local_corpus(tmp_path).source == before
    write(tmp_path, **{"b.txt": "two"})
    assert local_corpus(tmp_path).source != before
