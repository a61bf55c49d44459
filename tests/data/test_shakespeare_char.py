"""Tiny Shakespeare has a character vocabulary and is split by position."""

import time

import pytest

from data.dataset import DataError, open_dataset
from data.shakespeare_char.prepare import main

PLAY = "First Citizen:\nSpeak, speak.\n\n" * 40


def test_a_given_text_is_split_by_position(tmp_path):
    (tmp_path / "play.txt").write_text(PLAY)
    main(["--input", str(tmp_path / "play.txt"), "--out", str(tmp_path / "out")])
    dataset = open_dataset(tmp_path / "out")
    assert dataset.tokenizer.n_vocab == len(set(PLAY)) + 1
    parts = [dataset.split(name).shards[0].tokens()[:-1] for name in ("train", "val")]
    assert "".join(map(dataset.tokenizer.decode, parts)) == PLAY
    assert [len(part) for part in parts] == [1080, 120]


def test_an_absent_text_is_named(tmp_path):
    with pytest.raises(DataError, match=r"absent\.txt"):
        main(["--input", str(tmp_path / "absent.txt"), "--out", str(tmp_path / "out")])


@pytest.mark.usefixtures("offline")
def test_without_a_network_it_fails_quickly_with_the_remedy(tmp_path):
    start = time.monotonic()
    with pytest.raises(DataError, match=r"no connection.*--input FILE"):
        main(["--out", str(tmp_path)])
    assert time.monotonic() - start < 1
