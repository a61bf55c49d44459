"""Existing token files become a dataset."""

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
    write_shard(tmp_path / "train.bin", [DOCUMENT, np.array([300], dtype=np.uint16)])
    with pytest.raises(DataError, match=r"train\.bin: token 7 is 300, but tokenizer 'byte'"):
        adopt(tmp_path, byte_tokenizer())


def test_files_that_do_not_fit_are_refused(tmp_path):
    with pytest.raises(DataError, match="has 'train' or 'val' in its name"):
        adopt(tmp_path, byte_tokenizer())
    DOCUMENT.tofile(tmp_path / "fine_train_1.bin")  # without a header
    with pytest.raises(DataError, match=r"fine_train_1\.bin: 14 bytes, expected at least 1,024"):
        adopt(tmp_path, byte_tokenizer())
    (tmp_path / "fine_train_1.bin").rename(tmp_path / "other.bin")
    with pytest.raises(DataError, match=r"other\.bin: expected either 'train' or 'val'"):
        adopt(tmp_path, byte_tokenizer())
