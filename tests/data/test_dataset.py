"""A dataset opens by name or folder, and opening it finds every structural fault."""

import json
import shutil

import numpy as np
import pytest

import data.dataset
from data.dataset import DataError, known_datasets, open_dataset
from data.meta import META, TOKENIZER
from data.shards import write_shard
from data.tokenizer import byte_tokenizer


@pytest.fixture
def folder(tmp_path, write_counting):
    return write_counting(tmp_path / "set", train=(60, 40), val=(50,))


@pytest.fixture
def named(tmp_path, monkeypatch):
    """Make all known datasets unprepared."""
    for name in known_datasets():
        (tmp_path / "data" / name).mkdir(parents=True)
        (tmp_path / "data" / name / "prepare.py").touch()
    monkeypatch.setattr(data.dataset, "DATA", tmp_path / "data")
    return tmp_path / "data"


def edit_meta(folder, change):
    content = json.loads((folder / META).read_text())
    change(content)
    (folder / META).write_text(json.dumps(content))


def test_a_folder_opens(folder, counting_tokenizer):
    dataset = open_dataset(folder)
    assert dataset.dir == folder
    assert dataset.tokenizer.sha256 == counting_tokenizer.sha256
    assert dataset.split("train").n_tokens == 100
    assert dataset.split("train").sizes.tolist() == [60, 40]
    assert dataset.meta["splits"]["val"]["tokens"] == 50


def test_a_known_name_opens_its_prepared_folder(folder, named):
    shutil.copytree(folder, named / "tinystories" / "prepared")
    assert open_dataset("tinystories").split("val").n_tokens == 50


@pytest.mark.parametrize("name", sorted(set(known_datasets()) - {"pystdlib"}))
def test_an_unprepared_name_gives_the_command(name, named):
    with pytest.raises(DataError, match=rf"python -m data\.{name}\.prepare`"):
        open_dataset(name)


def test_pystdlib_prepares_itself(folder, named, monkeypatch):
    def prepare(argv):
        assert argv == []
        shutil.copytree(folder, named / "pystdlib" / "prepared")

    monkeypatch.setattr(data.pystdlib.prepare, "main", prepare)
    assert open_dataset("pystdlib").split("train").n_tokens == 100


def test_a_misspelt_name_gives_the_nearest():
    with pytest.raises(DataError, match="did you mean 'openwebtext'"):
        open_dataset("openwebtxt")
    with pytest.raises(
        DataError, match=r"'zzz': neither a folder nor one of .*pystdlib.*task:NAME"
    ):
        open_dataset("zzz")


def test_a_folder_without_meta_gives_the_command(tmp_path):
    with pytest.raises(DataError, match=r"has no meta\.json.*python -m data\.adopt"):
        open_dataset(tmp_path)


def test_rows_are_the_tokens_behind_each_start(folder):
    train = open_dataset(folder).split("train")
    rows = train.rows(np.array([1, 0]), np.array([2, 58]), 4)
    assert rows.tolist() == [[62, 63, 64, 65], [58, 59, -1, -1]]


def name_of_val(name):
    return lambda m: m["splits"]["val"]["files"][0].update(name=name)


META_FAULTS = {
    "other format": (
        lambda m: m.update(format=2),
        r"format: .*expected 1; prepare the data again .found 2",
    ),
    "no tokenizer": (lambda m: m.pop("tokenizer"), "tokenizer: Field required"),
    "vocabulary": (
        lambda m: m["tokenizer"].update(n_vocab=65537),
        r"tokenizer\.n_vocab: .*65536 .found 65537",
    ),
    "no val": (lambda m: m["splits"].pop("val"), r"splits\.val: Field required"),
    "count": (
        lambda m: m["splits"]["val"].update(tokens=51),
        "states 51 tokens, but its files hold 50",
    ),
    "empty": (lambda m: m["splits"]["val"].update(tokens=0, files=[]), "'val' is empty"),
    "files": (
        lambda m: m["splits"]["val"]["files"][0].pop("sha256"),
        r"files\.0\.sha256: Field required",
    ),
    "twice": (
        lambda m: m["splits"]["val"].update(m["splits"]["train"]),
        r"lists files twice: train_000000\.bin, train_000001\.bin",
    ),
    "other folder": (
        name_of_val("../val.bin"),
        r"files\.0\.name: .*not the name of a file in this",
    ),
    "absolute": (name_of_val("/val.bin"), r"files\.0\.name: .*not the name of a file in this"),
    "no name": (name_of_val("."), r"files\.0\.name: .*not the name of a file in this"),
    "null": (name_of_val("a\0b"), r"files\.0\.name: .*not the name of a file in this"),
    "negative": (lambda m: m["splits"]["val"].update(documents=-1), r"val\.documents: .*greater"),
    "unknown key": (lambda m: m.update(layot={}), "layot: Extra inputs"),
    "tokens": (
        lambda m: m["splits"]["train"]["files"][1].update(bytes=1102),
        r"train_000001\.bin: 1,104 bytes with 40 tokens, .*1,102 bytes with 40 tokens",
    ),
    "header": (
        lambda m: m["splits"]["val"]["files"][0].update(header=False),
        "1,124 bytes with 562 tokens",
    ),
}


@pytest.mark.parametrize("fault", META_FAULTS)
def test_a_fault_in_meta_is_found_at_opening(fault, folder):
    change, message = META_FAULTS[fault]
    edit_meta(folder, change)
    with pytest.raises(DataError, match=message):
        open_dataset(folder)


@pytest.mark.parametrize("raw", [b"", b"[]", b"\xff"])
def test_meta_that_is_no_json_object_is_refused(raw, folder):
    (folder / META).write_bytes(raw)
    with pytest.raises(DataError, match=r"meta\.json"):
        open_dataset(folder)


def test_a_truncated_shard_is_found_at_opening(folder):
    with open(folder / "train_000001.bin", "r+b") as file:
        file.truncate(1100)
    with pytest.raises(DataError, match=r"train_000001\.bin: 1,100 bytes, expected 1,104"):
        open_dataset(folder)


def test_a_missing_shard_is_found_at_opening(folder):
    (folder / "val_000000.bin").unlink()
    with pytest.raises(DataError, match=r"val_000000\.bin: cannot be read"):
        open_dataset(folder)


def test_another_shard_of_the_same_name_is_found_at_opening(folder):
    write_shard(folder / "val_000000.bin", [np.arange(7, dtype=np.uint16)])
    with pytest.raises(DataError, match="7 tokens, but"):
        open_dataset(folder)


def test_another_or_no_tokenizer_is_found_at_opening(folder):
    byte_tokenizer().save(folder / TOKENIZER)
    with pytest.raises(DataError, match=r"tokenizer\.json: is .*'byte'.*'counting'"):
        open_dataset(folder)
    (folder / TOKENIZER).unlink()
    with pytest.raises(DataError, match=r"tokenizer\.json: cannot read the tokenizer"):
        open_dataset(folder)


def test_a_key_that_is_there_twice_is_refused(folder):
    text = (folder / META).read_text()
    (folder / META).write_text(text.replace("{", '{"format": 1,', 1))
    with pytest.raises(DataError, match="key 'format' is there twice"):
        open_dataset(folder)


def test_a_shard_may_be_in_a_subfolder_but_not_be_one(folder):
    (folder / "sub").mkdir()
    (folder / "val_000000.bin").rename(folder / "sub" / "val.bin")
    edit_meta(folder, name_of_val("sub/val.bin"))
    assert open_dataset(folder).split("val").n_tokens == 50
    edit_meta(folder, name_of_val("sub"))
    with pytest.raises(DataError, match="sub: is not a file"):
        open_dataset(folder)


@pytest.mark.parametrize("name", ["", "a\0b", "x" * 5000])
def test_a_name_that_cannot_be_a_path_is_refused(name):
    with pytest.raises(DataError, match="dataset '"):
        open_dataset(name)
