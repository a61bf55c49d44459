"""Token files are read and written, and damaged ones are refused."""

import pickle
import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.files import sha256_of
from data.shards import DataError, Shard, has_header, write_shard

IDS = np.arange(1000, dtype=np.uint16)


@given(st.lists(st.lists(st.integers(0, 65535)), min_size=1).filter(any))
def test_written_tokens_are_read_back(tmp_path_factory, documents):
    path = tmp_path_factory.mktemp("shards") / "s.bin"
    entry = write_shard(path, [np.array(ids, dtype=np.uint16) for ids in documents])
    tokens = Shard(path).tokens()
    assert tokens.tolist() == [token for ids in documents for token in ids]
    assert entry == {
        "name": "s.bin",
        "tokens": len(tokens),
        "bytes": path.stat().st_size,
        "header": True,
        "sha256": sha256_of(path),
    }


def test_the_bytes_are_those_of_llm_c(tmp_path):
    write_shard(tmp_path / "s.bin", [np.array([1, 258], dtype=np.uint16)])
    header = struct.pack("<256i", 20240520, 1, 2, *[0] * 253)
    assert (tmp_path / "s.bin").read_bytes() == header + bytes([1, 0, 2, 1])


def test_headerless_files_are_read(tmp_path):
    IDS.tofile(tmp_path / "train.bin")
    shard = Shard(tmp_path / "train.bin", headerless=True)
    assert not has_header(tmp_path / "train.bin")
    np.testing.assert_array_equal(shard.tokens(), IDS)


def test_a_shard_without_tokens_is_not_written(tmp_path):
    with pytest.raises(DataError, match="0 tokens"):
        write_shard(tmp_path / "s.bin", [np.array([], dtype=np.uint16)])


def patched(offset: int, value: int):
    """Return a function that writes an int32 into the header."""
    return lambda raw: raw[:offset] + struct.pack("<i", value) + raw[offset + 4 :]


CORRUPTIONS = {
    "truncated": (lambda raw: raw[:-10], "3,014 bytes, expected 3,024 for 1,000 tokens"),
    "too long": (lambda raw: raw + b"xx", "3,026 bytes, expected 3,024"),
    "odd size": (lambda raw: raw[:-1], "3,023 bytes, expected 3,024"),
    "cut in the header": (lambda raw: raw[:100], "100 bytes, expected at least 1,024"),
    "empty file": (lambda raw: b"", "0 bytes, expected at least 1,024"),
    "wrong magic": (patched(0, 7), "begins with 7, expected 20240520"),
    "wrong version": (patched(4, 2), "version 2, expected 1"),
    "count too large": (patched(8, 1001), "3,024 bytes, expected 3,026 for 1,001 tokens"),
    "count too small": (patched(8, 999), "3,024 bytes, expected 3,022 for 999 tokens"),
    "count negative": (patched(8, -1), "states -1 tokens"),
    "no tokens": (lambda raw: patched(8, 0)(raw)[:1024], "holds no tokens"),
}


@pytest.mark.parametrize("fault", CORRUPTIONS)
def test_a_corrupt_shard_is_refused(fault, tmp_path):
    corrupt, message = CORRUPTIONS[fault]
    path = tmp_path / "s.bin"
    write_shard(path, [IDS])
    path.write_bytes(corrupt(path.read_bytes()))
    with pytest.raises(DataError, match=message) as caught:
        Shard(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("raw", "message"), [(b"abc", "3 bytes, expected 2 for 1"), (b"", "no tokens")]
)
def test_a_corrupt_headerless_file_is_refused(raw, message, tmp_path):
    (tmp_path / "train.bin").write_bytes(raw)
    with pytest.raises(DataError, match=message):
        Shard(tmp_path / "train.bin", headerless=True)


def test_an_absent_shard_is_named(tmp_path):
    with pytest.raises(DataError, match=r"absent\.bin: cannot be read"):
        Shard(tmp_path / "absent.bin")


@pytest.mark.parametrize("mapped", [False, True])
def test_a_shard_that_shrinks_later_is_an_error_not_a_crash(mapped, tmp_path):
    path = tmp_path / "s.bin"
    write_shard(path, [IDS])
    shard = Shard(path)
    if mapped:
        shard.tokens()
    with open(path, "r+b") as file:
        file.truncate(1500)
    with pytest.raises(DataError, match="1,500 bytes, expected 3,024"):
        shard.tokens()


def test_a_pickled_shard_carries_no_tokens(tmp_path):
    write_shard(tmp_path / "s.bin", [IDS])
    shard = Shard(tmp_path / "s.bin")
    shard.tokens()
    raw = pickle.dumps(shard)
    assert len(raw) < 500
    np.testing.assert_array_equal(pickle.loads(raw).tokens(), IDS)
