"""Fixtures: small datasets, a network that is absent, and GPT-2's tokenizer files."""

import shutil
import socket
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

import data.files
from data.meta import TOKENIZER, empty_split, write_meta
from data.shards import write_shard
from data.tokenizer import Tokenizer

GPT2_CACHE = Path(__file__).parents[3] / "shared" / "tiktoken_cache"


@pytest.fixture(scope="session")
def counting_tokenizer() -> Tokenizer:
    """A tokenizer with 1025 ids, so that a token's id can be its position in the data."""
    return Tokenizer("counting", r".", {i.to_bytes(2, "big"): i for i in range(1024)})


@pytest.fixture(scope="session")
def write_counting(counting_tokenizer) -> Callable[[Path, Sequence[int], Sequence[int]], Path]:
    """Return a function that writes a dataset; the ids of each split are 0, 1, 2, ..."""

    def write(folder: Path, train: Sequence[int] = (100,), val: Sequence[int] = (50,)) -> Path:
        splits = {"train": empty_split(), "val": empty_split()}
        for name, sizes in (("train", train), ("val", val)):
            first = 0
            for number, size in enumerate(sizes):
                ids = np.arange(first, first + size, dtype=np.uint16)
                entry = write_shard(folder / f"{name}_{number:06d}.bin", [ids])
                splits[name]["files"].append(entry)
                splits[name]["tokens"] += size
                first += size
        counting_tokenizer.save(folder / TOKENIZER)
        write_meta(folder, {"dataset": "counting"}, counting_tokenizer, splits)
        return folder

    return write


@pytest.fixture(params=["refused", "silent"])
def offline(request, monkeypatch) -> None:
    """Let every connection fail: refused at once, or without an answer in the time allowed."""
    monkeypatch.setattr(data.files, "PROBE_S", 0.3)

    def connect(*args, **kwargs):
        if request.param == "silent":
            time.sleep(3)
        raise OSError("no network")

    monkeypatch.setattr(socket, "create_connection", connect)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)


@pytest.fixture
def gpt2_cache(tmp_path, monkeypatch) -> Path:
    """Copy GPT-2's files to a cache of the test, because tiktoken deletes damaged files."""
    if not GPT2_CACHE.is_dir():
        pytest.skip(f"GPT-2's BPE files are not at {GPT2_CACHE}")
    folder = tmp_path / "tiktoken"
    folder.mkdir()
    for file in GPT2_CACHE.iterdir():
        shutil.copyfile(file, folder / file.name)
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(folder))
    return folder
