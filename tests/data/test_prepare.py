"""Preparation turns documents into a dataset, and can be killed and continued."""

import errno
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import PackageNotFoundError
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from filelock import FileLock

import data.meta
import data.preparation
import data.text.prepare
from data.corpus import Corpus
from data.dataset import DataError, open_dataset
from data.meta import META
from data.preparation import PROGRESS
from data.prepare import prepare
from data.readers import Skipped
from data.tokenizer import Tokenizer, char_tokenizer

ROOT = Path(__file__).parents[2]
DOCUMENTS = [f"document {i}: " + "words of text " * (i % 7) for i in range(400)]
SETTINGS = dict(tokenizer="byte", vocab_size=None, num_proc=1, shard_tokens=2000, val_fraction=0.2)


def corpus_of(documents, **more):
    return Corpus(
        source={"dataset": "test"}, documents=lambda n: islice(documents, n, None), **more
    )


def texts(dataset, split):
    """Return the decoded documents of a split."""
    ids = np.concatenate([shard.tokens() for shard in dataset.split(split).shards])
    ends = np.flatnonzero(ids == dataset.tokenizer.eot)
    assert ends[-1] == len(ids) - 1
    return [dataset.tokenizer.decode(part[part != 256]) for part in np.split(ids, ends + 1)[:-1]]


def files(folder):
    """Return the content of every file in a folder."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_documents_come_back_in_order_and_in_one_split_each(tmp_path):
    prepare(corpus_of(DOCUMENTS), out=tmp_path, **SETTINGS)
    dataset = open_dataset(tmp_path)
    train, val = texts(dataset, "train"), texts(dataset, "val")
    assert not set(train) & set(val)
    assert train == [text for text in DOCUMENTS if text in set(train)]
    assert val == [text for text in DOCUMENTS if text in set(val)]
    assert len(train) + len(val) == len(DOCUMENTS)
    assert 0.1 < len(val) / len(DOCUMENTS) < 0.3  # 0.2 expected, within 5 standard deviations


def test_meta_counts_what_the_shards_hold(tmp_path):
    prepare(corpus_of(DOCUMENTS), out=tmp_path, **SETTINGS)
    dataset = open_dataset(tmp_path)
    for name in ("train", "val"):
        split = dataset.meta["splits"][name]
        size = sum(len(text.encode()) for text in texts(dataset, name))
        assert split["documents"] == len(texts(dataset, name))
        assert split["text_bytes"] == size
        assert split["tokens"] == size + split["documents"] == dataset.split(name).n_tokens
        assert split["bytes_per_token"] == pytest.approx(size / split["tokens"], abs=1e-4)
        assert len(split["files"]) > 2
    assert not (tmp_path / PROGRESS).exists()


@pytest.mark.parametrize("tokenizer", ["byte", "bpe"])
def test_the_number_of_threads_does_not_change_a_byte(tokenizer, tmp_path):
    settings = {**SETTINGS, "tokenizer": tokenizer}
    for n in (1, 2):
        out = tmp_path / str(n)
        prepare(corpus_of(DOCUMENTS), out=out, bpe_vocab_size=280, **{**settings, "num_proc": n})
    assert files(tmp_path / "1") == files(tmp_path / "2")


def test_the_split_of_a_document_depends_on_nothing_else(tmp_path):
    prepare(corpus_of(DOCUMENTS), out=tmp_path / "a", **SETTINGS)
    prepare(corpus_of(DOCUMENTS[::-1][:300]), out=tmp_path / "b", **SETTINGS)
    few, many = (set(texts(open_dataset(tmp_path / name), "val")) for name in "ba")
    assert few == many & set(DOCUMENTS[::-1][:300])


def test_a_second_call_does_nothing(tmp_path, capsys):
    prepare(corpus_of(DOCUMENTS), out=tmp_path, **SETTINGS)
    before = files(tmp_path)
    prepare(corpus_of(None), out=tmp_path, **SETTINGS)  # reading the documents would fail
    assert "already prepared" in capsys.readouterr().out
    assert files(tmp_path) == before


def test_a_second_call_with_other_settings_is_refused(tmp_path):
    prepare(corpus_of(DOCUMENTS), out=tmp_path, **SETTINGS)
    with pytest.raises(DataError, match=r"(?s)other settings.*'byte'.*'bpe'.*--out"):
        prepare(corpus_of(DOCUMENTS), out=tmp_path, **{**SETTINGS, "tokenizer": "bpe"})


KILLED = """
import os, signal, sys
from pathlib import Path
from tests.data.test_prepare import DOCUMENTS, SETTINGS, corpus_of
from data.prepare import prepare
from data.readers import Skipped
from data.tokenizer import Tokenizer

class Deadly(list):
    def __iter__(self):
        for number, document in enumerate(super().__iter__()):
            if number == 300:
                os.kill(os.getpid(), signal.SIGKILL)
            yield document

prepare(corpus_of(Deadly(DOCUMENTS)), out=Path(sys.argv[1]), **SETTINGS)
"""


def test_a_killed_preparation_continues_to_the_same_bytes(tmp_path, capsys):
    command = [sys.executable, "-c", KILLED, str(tmp_path / "killed")]
    killed = subprocess.run(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert killed.returncode == -9
    progress = json.loads((tmp_path / "killed" / PROGRESS).read_text())
    assert 0 < progress["documents_read"] < 300
    assert not (tmp_path / "killed" / META).exists()
    (tmp_path / "killed" / "train_000099.bin.01234567.tmp").touch()
    prepare(corpus_of(DOCUMENTS), out=tmp_path / "killed", **SETTINGS)
    assert f"continues after {progress['documents_read']} documents" in capsys.readouterr().out
    prepare(corpus_of(DOCUMENTS), out=tmp_path / "whole", **SETTINGS)
    assert files(tmp_path / "killed") == files(tmp_path / "whole")


def test_a_failure_before_the_first_part_leaves_nothing_in_the_way(tmp_path):
    def documents(start):
        raise DataError("no network")

    with pytest.raises(DataError, match="no network"):
        prepare(Corpus(source={}, documents=documents), out=tmp_path, **SETTINGS)
    prepare(corpus_of(DOCUMENTS), out=tmp_path, **SETTINGS)
    assert open_dataset(tmp_path).split("val").n_tokens > 0


def test_documents_without_text_are_counted_by_reason_and_left_out(tmp_path, capsys):
    broken = ["lone surrogate \ud800", Skipped("a, line 3", "row without text"), *DOCUMENTS]
    prepare(corpus_of(broken), out=tmp_path, **SETTINGS)
    printed = capsys.readouterr()
    assert "skipped a, line 3: row without text" in printed.err
    assert "skipped documents: 1 (not UTF-8), 1 (row without text)" in printed.out
    dataset = open_dataset(tmp_path)
    assert dataset.meta["documents_skipped"] == 2
    assert dataset.meta["skipped"] == {"not UTF-8": 1, "row without text": 1}
    assert len(texts(dataset, "train")) + len(texts(dataset, "val")) == len(DOCUMENTS)


@pytest.mark.parametrize(("fraction", "split"), [(1e-9, "val"), (1 - 1e-9, "train")])
def test_an_empty_split_is_refused_and_can_be_prepared_again(fraction, split, tmp_path):
    with pytest.raises(DataError, match=f"none of 400 documents went into split '{split}'"):
        prepare(corpus_of(DOCUMENTS), out=tmp_path, **{**SETTINGS, "val_fraction": fraction})
    prepare(corpus_of(DOCUMENTS), out=tmp_path, **SETTINGS)
    assert open_dataset(tmp_path).split(split).n_tokens > 0


@pytest.mark.parametrize("fraction", [1e-9, 1 - 1e-9])
def test_the_val_fraction_that_is_suggested_for_few_documents_works(fraction, tmp_path):
    few = corpus_of(DOCUMENTS[:3])
    with pytest.raises(DataError, match="--val_fraction=") as caught:
        prepare(few, out=tmp_path, **{**SETTINGS, "val_fraction": fraction})
    suggested = float(str(caught.value).rpartition("--val_fraction=")[2])
    prepare(few, out=tmp_path, **{**SETTINGS, "val_fraction": suggested})


def test_equal_documents_cannot_be_split_and_no_val_fraction_is_suggested(tmp_path):
    with pytest.raises(DataError, match="two documents with different texts") as caught:
        prepare(corpus_of(["same text"] * 60), out=tmp_path, **SETTINGS)
    assert "--val_fraction" not in str(caught.value)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EFBIG])
def test_a_full_disk_stops_the_preparation_which_continues_later(code, tmp_path, monkeypatch):
    def full(path, documents, real=data.preparation.write_shard):
        if "000002" in path.name:
            raise OSError(code, os.strerror(code), str(path))
        return real(path, documents)

    with monkeypatch.context() as patched:
        patched.setattr(data.preparation, "write_shard", full)
        with pytest.raises(DataError, match=r"000002\.bin: .*continues where it stopped"):
            prepare(corpus_of(DOCUMENTS), out=tmp_path / "a", **SETTINGS)
    for name in "ab":
        prepare(corpus_of(DOCUMENTS), out=tmp_path / name, **SETTINGS)
    assert files(tmp_path / "a") == files(tmp_path / "b")


BAD_SETTINGS = {
    "vocab_size=300: only for": {"vocab_size": 300},
    "'gtp2': unknown; did you mean 'gpt2'": {"tokenizer": "gtp2"},
    "num_proc=0": {"num_proc": 0},
    "shard_tokens=0": {"shard_tokens": 0},
    "shard_tokens=3000000000: must be at most": {"shard_tokens": 3_000_000_000},
    "val_fraction=1": {"val_fraction": 1.0},
}


@pytest.mark.parametrize("message", BAD_SETTINGS)
def test_bad_settings_are_refused_before_any_work(message, tmp_path):
    with pytest.raises(ValueError, match=message):
        prepare(corpus_of(None), out=tmp_path / "out", **{**SETTINGS, **BAD_SETTINGS[message]})
    assert not (tmp_path / "out").exists()


def test_a_bpe_is_trained_on_training_documents_only(tmp_path):
    out, settings = tmp_path / "out", {**SETTINGS, "tokenizer": "bpe", "vocab_size": 258}
    documents = ["ab" * 3] * 10, ["xy" * 50] * 10
    corpus = corpus_of(
        [text for pair in zip(*documents, strict=True) for text in pair],
        split_of=lambda index: ("train", "val")[index % 2],
    )
    prepare(corpus, out=out, **settings)
    assert open_dataset(out).tokenizer.decode([256]) == "ab"


@pytest.mark.usefixtures("gpt2_cache")
def test_a_folder_of_text_is_prepared_by_its_command(tmp_path):
    (tmp_path / "in").mkdir()
    for number, text in enumerate(DOCUMENTS[:60]):
        (tmp_path / "in" / f"{number:03d}.txt").write_text(text)
    arguments = ["--input", str(tmp_path / "in"), "--out", str(tmp_path / "out")]
    data.text.prepare.main([*arguments, "--tokenizer=gpt2", "--val_fraction=0.3"])
    dataset = open_dataset(tmp_path / "out")
    assert dataset.tokenizer.n_vocab == 50257
    assert sum(split["documents"] for split in dataset.meta["splits"].values()) == 60


def test_a_single_text_file_is_cut_in_two(tmp_path):
    text = "one é two " * 100
    (tmp_path / "in.txt").write_bytes(text.encode())
    arguments = ["--input", str(tmp_path / "in.txt"), "--out", str(tmp_path / "out")]
    data.text.prepare.main([*arguments, "--tokenizer=byte", "--val_fraction=0.25"])
    dataset = open_dataset(tmp_path / "out")
    assert [texts(dataset, name) for name in ("train", "val")] == [[text[:750]], [text[750:]]]
    command = [*arguments, "--tokenizer=byte", "--val_fraction=0.25"]
    before = edit_meta(tmp_path / "out", lambda source: source.pop("sha256"))
    data.text.prepare.main(command)  # a release that did not store it
    (tmp_path / "out/meta.json").write_text(before)
    (tmp_path / "in.txt").write_bytes(text.replace("two", "six").encode())
    with pytest.raises(DataError, match="prepared with other settings"):
        data.text.prepare.main(command)


def edit_meta(folder, change):
    """Change the source in meta.json, and return the text from before."""
    before = (folder / "meta.json").read_text()
    meta = json.loads(before)
    change(meta["source"])
    (folder / "meta.json").write_text(json.dumps(meta))
    return before


def test_a_tokenizer_file_that_changed_is_another_setting(tmp_path):
    path, corpus = tmp_path / "tokenizer.json", corpus_of(["a" * n + "b" for n in range(40)])
    char_tokenizer("abc").save(path)
    prepare(corpus, out=tmp_path / "out", **SETTINGS | {"tokenizer": str(path)})
    char_tokenizer("abd").save(path)
    with pytest.raises(DataError, match="prepared with other settings"):
        prepare(corpus, out=tmp_path / "out", **SETTINGS | {"tokenizer": str(path)})


def test_packages_that_are_not_installed_have_no_version(tmp_path, monkeypatch):
    def version(name):
        if name == "datasets":
            raise PackageNotFoundError(name)
        return "1"

    monkeypatch.setattr(data.meta, "version", version)
    prepare(corpus_of(DOCUMENTS), out=tmp_path, **SETTINGS)
    versions = json.loads((tmp_path / "meta.json").read_text())["created_with"]
    assert versions["numpy"] == "1"
    assert "datasets" not in versions


@pytest.mark.parametrize("name", ["fineweb", "openwebtext", "tinystories"])
def test_hub_datasets_are_prepared_from_local_rows(name, tmp_path):
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in DOCUMENTS))
    command = [sys.executable, "-m", f"data.{name}.prepare", "--local", str(tmp_path / "in.jsonl")]
    command += ["--out", str(tmp_path / "out"), "--tokenizer=byte", "--val_fraction=0.2"]
    subprocess.run(command, cwd=ROOT, check=True)
    dataset = open_dataset(tmp_path / "out")
    assert sorted(texts(dataset, "train") + texts(dataset, "val")) == sorted(DOCUMENTS)


def test_documents_without_a_character_are_no_dataset(tmp_path):
    with pytest.raises(DataError, match="none of 2 documents went into split 'train'"):
        prepare(corpus_of(["", ""]), out=tmp_path, **SETTINGS)


def test_a_tokenizer_that_drops_text_stops_the_preparation(tmp_path):
    Tokenizer("words", r"\w+", {bytes([i]): i for i in range(256)}).save(tmp_path / "words.json")
    settings = {**SETTINGS, "tokenizer": str(tmp_path / "words.json")}
    with pytest.raises(ValueError, match="tokenizer 'words' cannot encode"):
        prepare(corpus_of(DOCUMENTS), out=tmp_path / "out", **settings)


def test_a_preparation_that_waits_for_another_says_so(tmp_path, capsys):
    lock = FileLock(tmp_path / "prepare.lock")
    with ThreadPoolExecutor(1) as pool:
        with lock:
            waiting = pool.submit(prepare, corpus_of(DOCUMENTS), out=tmp_path, **SETTINGS)
            printed = ""
            while "waiting for another process" not in printed:
                assert not waiting.done()
                printed += capsys.readouterr().err
        waiting.result()
    assert open_dataset(tmp_path).split("val").n_tokens > 0


def test_data_prepared_inside_its_own_input_is_found_again(tmp_path, capsys):
    for number, text in enumerate(DOCUMENTS[:60]):
        (tmp_path / f"{number:03d}.txt").write_text(text, encoding="utf-8")
    arguments = ["--input", str(tmp_path), "--out", str(tmp_path / "prepared")]
    for _ in range(2):
        data.text.prepare.main([*arguments, "--tokenizer=byte", "--val_fraction=0.3"])
    assert "already prepared" in capsys.readouterr().out
