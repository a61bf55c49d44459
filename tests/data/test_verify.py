"""`python -m data.verify` finds damaged shards."""

import pytest

from data.dataset import DataError, open_dataset
from data.verify import main, verify


def test_an_intact_dataset_passes(tmp_path, write_counting, capsys):
    write_counting(tmp_path, train=(60, 40))
    main([str(tmp_path)])
    assert "3 files agree with meta.json" in capsys.readouterr().out


def test_one_flipped_bit_is_found_and_its_file_named(tmp_path, write_counting):
    path = write_counting(tmp_path, train=(60, 40)) / "train_000001.bin"
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    with pytest.raises(DataError, match=r"differs .*: train_000001\.bin;"):
        verify(open_dataset(tmp_path))
