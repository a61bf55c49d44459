"""Existing token files become a dataset."""

import os
import pickle

import numpy as np
import pytest

from data.adopt import adopt, main
from data.dataset import DataError, open_dataset
from data.shards import write_shard
from data.tokenizer import byte_tokenizer
from data.verify import verify

IDS = np.frombuffer("one é".encode(), dtype=np.uint8).astype(np.uint16)
DOCUMENT = np.append(IDS, np.uint16(256))  # 6 bytes and end-of-text


def test_llm_c_shards_are_adopted(tmp_path):
    write_shard(tmp_path / "fine_train_000001.bin", [DOCUMENT] * 3)
    write_shard(tmp_path / "fine_train_000002.bin", [DOCUMENT])
    write_shard(tmp_path / "fine_val_000000.bin", [DOCUMENT])
    main([str(tmp_path), "--tokenizer", "byte"])
    dataset = open_dataset(tmp_path)
    train = dataset.meta["splits"]["train"]
    assert (train["tokens"], train["documents"], train["text_bytes"]) == (28, 4, 24)
    assert dataset.split("train").sizes.tolist() == [21, 7]
    assert verify(dataset) == 3


def test_nanogpt_files_are_adopted(tmp_path):
    for name in ("train.bin", "val.bin"):
        np.tile(DOCUMENT, 2).tofile(tmp_path / name)
    adopt(tmp_path, byte_tokenizer())
    dataset = open_dataset(tmp_path)
    assert dataset.tokenizer.decode(dataset.split("val").shards[0].tokens()[:6]) == "one é"
    assert dataset.split("train").n_tokens == 14
    assert verify(dataset) == 2


def test_a_folder_is_adopted_once(tmp_path):
    for name in ("train.bin", "val.bin"):
        write_shard(tmp_path / name, [DOCUMENT])
    adopt(tmp_path, byte_tokenizer())
    with pytest.raises(DataError, match=r"has a meta\.json already"):
        adopt(tmp_path, byte_tokenizer())


def test_ids_of_another_tokenizer_are_refused(tmp_path):
    write_shard(tmp_path / "val.bin", [DOCUMENT])
    write_shard(tmp_path / "train.bin", [DOCUMENT, np.array([300], dtype=np.uint16)])
    with pytest.raises(DataError, match=r"train\.bin: token 7 is 300, but tokenizer 'byte'"):
        adopt(tmp_path, byte_tokenizer())


def test_files_that_do_not_fit_are_refused(tmp_path):
    with pytest.raises(DataError, match="has 'train' or 'val' in its name"):
        adopt(tmp_path, byte_tokenizer())
    write_shard(tmp_path / "fine_val_1.bin", [DOCUMENT])
    DOCUMENT.tofile(tmp_path / "fine_train_1.bin")  # without a header
    with pytest.raises(DataError, match=r"fine_train_1\.bin: 14 bytes, expected at least 1,024"):
        adopt(tmp_path, byte_tokenizer())
    (tmp_path / "fine_train_1.bin").rename(tmp_path / "other.bin")
    with pytest.raises(DataError, match=r"other\.bin: expected either 'train' or 'val'"):
        adopt(tmp_path, byte_tokenizer())


def train_tokens(folder):
    return open_dataset(folder).split("train").shards[0].tokens().tolist()


@pytest.mark.parametrize("dtype", ["uint16", "uint32", "int64"])
def test_numpy_arrays_are_adopted(tmp_path, dtype):
    for name in ("edu_train_0.npy", "edu_val_0.npy"):
        np.save(tmp_path / name, DOCUMENT.astype(dtype))
    adopt(tmp_path, byte_tokenizer())
    assert train_tokens(tmp_path) == DOCUMENT.tolist()
    assert verify(open_dataset(tmp_path)) == 2


@pytest.mark.parametrize("dtype", ["uint32", "uint64"])
def test_wide_tokens_without_a_header_are_recognized_and_converted_on_demand(tmp_path, dtype):
    tokens = np.tile(DOCUMENT, 5)
    for name in ("train.bin", "val.bin"):
        tokens.astype(dtype).tofile(tmp_path / name)
    with pytest.raises(
        DataError, match=rf"train\.bin: looks like {dtype}.*is above 15.*--dtype={dtype}"
    ):
        adopt(tmp_path, byte_tokenizer())
    (tmp_path / "train.bin.uint16.12ab34cd.tmp").write_bytes(b"of a command that was killed")
    main([str(tmp_path), "--tokenizer=byte", f"--dtype={dtype}"])
    assert train_tokens(tmp_path) == tokens.tolist()
    assert not [*tmp_path.glob("*.tmp")]


def test_files_in_subfolders_belong_to_the_split_of_their_folder(tmp_path):
    for split in ("train", "validation"):
        write_shard(tmp_path / split / "part-0.bin", [DOCUMENT])
    adopt(tmp_path, byte_tokenizer())
    assert open_dataset(tmp_path).meta["splits"]["val"]["files"][0]["name"] == (
        "validation/part-0.bin"
    )
    assert verify(open_dataset(tmp_path)) == 2


@pytest.mark.parametrize(
    ("array", "problem"),
    [
        (DOCUMENT.reshape(1, -1), "expected one row of integers"),
        (DOCUMENT.astype(float), "expected one row of integers"),
        (np.array([-1, 2], dtype=np.int32), "token 0 is -1"),
        (np.array([2, 300], dtype=np.int32), "token 1 is 300"),
        (np.array([], dtype=np.int32), "0 bytes of tokens"),
        (np.array([{}], dtype=object), "expected one row of integers"),
    ],
)
def test_an_array_that_holds_no_tokens_is_refused(tmp_path, array, problem):
    for name in ("train.npy", "val.npy"):
        np.save(tmp_path / name, array)
    with pytest.raises(DataError, match=problem):
        adopt(tmp_path, byte_tokenizer())
    assert {path.suffix for path in tmp_path.iterdir()} == {".npy", ".lock"}


def test_a_truncated_array_is_refused(tmp_path):
    for name in ("train.npy", "val.npy"):
        np.save(tmp_path / name, DOCUMENT.astype(np.uint32))
        os.truncate(tmp_path / name, 140)
    with pytest.raises(DataError, match=r"train\.npy: 140 bytes, expected 156"):
        adopt(tmp_path, byte_tokenizer())


def nanogpt_folder(folder, content):
    for name in ("train.bin", "val.bin"):
        np.array([0, 2, 1, 1], dtype=np.uint16).tofile(folder / name)
    (folder / "meta.pkl").write_bytes(content)
    return folder


def test_the_characters_of_nanogpt_are_taken_from_its_meta_pkl(tmp_path):
    characters = "\né🙂"
    meta = {"vocab_size": 3, "itos": dict(enumerate(characters))}
    meta["stoi"] = {character: i for i, character in meta["itos"].items()}
    main([str(nanogpt_folder(tmp_path, pickle.dumps(meta)))])
    dataset = open_dataset(tmp_path)
    assert dataset.tokenizer.decode(train_tokens(tmp_path)) == "\n🙂éé"
    assert dataset.tokenizer.encode("🙂é") == [2, 1]


class Dangerous:
    def __reduce__(self):
        return os.mkdir, ("executed",)


@pytest.mark.parametrize(
    "content",
    [
        pickle.dumps(Dangerous()),
        pickle.dumps({"itos": {0: Dangerous()}}),
        pickle.dumps({"itos": {0: "ab"}}),
        pickle.dumps({"itos": {0: "a", 1: "a"}}),
        pickle.dumps({"itos": ["a"]}),
        pickle.dumps([1]),
        b"",
        b"\x80\x04garbage",
    ],
)
def test_any_other_pickle_is_refused_and_nothing_in_it_is_executed(tmp_path, content, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=r"meta\.pkl: "):
        main([str(nanogpt_folder(tmp_path, content))])
    assert not (tmp_path / "executed").exists()


def test_without_a_meta_pkl_the_tokenizer_has_to_be_named(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main([str(tmp_path)])
    assert "--tokenizer is required" in capsys.readouterr().err
