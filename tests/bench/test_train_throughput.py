"""Both trainers' step times, of a stand-in for nanoGPT, whose sources are not here."""

import json

import numpy as np
import pytest

from bench import train_throughput
from bench.train_throughput import PRESETS, prepare

STAND_IN = """
import pickle, sys
settings = dict(argument[2:].split("=") for argument in sys.argv[1:])
meta = pickle.load(open(f"data/{settings['dataset']}/meta.pkl", "rb"))
for i in range(int(settings["max_iters"]) + 1):
    print(f"iter {i}: loss 1.0000, time {1e6 if i < 2 else meta['vocab_size']:.2f}ms, mfu 1.00%")
"""


@pytest.fixture
def nanogpt(tmp_path):
    folder = tmp_path / "nanoGPT"
    folder.mkdir()
    for name, text in {"train.py": STAND_IN, "model.py": "", "configurator.py": ""}.items():
        (folder / name).write_text(text)
    return folder


def test_both_sides_are_timed_without_their_warm_up(nanogpt, tmp_path, monkeypatch):
    out = tmp_path / "result.json"
    arguments = ["", "--preset=tiny", "--rounds=1", f"--nanogpt={nanogpt}", f"--out={out}"]
    monkeypatch.setattr("sys.argv", arguments)
    train_throughput.main()
    (row,) = json.loads(out.read_text())["rows"]
    assert row["step_ms"]["nanogpt"] == [320]  # 301 ids, padded to a multiple of 64; not 1e6
    assert row["tokens_per_s"]["nanogpt"] == 1e3 * 4 * 8 / 320
    assert row["ratio"] == row["tokens_per_s"]["ours"] / row["tokens_per_s"]["nanogpt"] > 0


def test_both_get_the_same_ids(tmp_path):
    assert prepare(tmp_path, PRESETS["tiny"]) == 301
    theirs = np.fromfile(tmp_path / "nanogpt/data/corpus/train.bin", dtype=np.uint16)
    ours = np.fromfile(tmp_path / "ours/train_000000.bin", dtype=np.uint16)[-len(theirs) :]
    np.testing.assert_array_equal(ours, theirs)
    assert len(theirs) > 15_000


def test_a_run_that_is_all_warm_up_is_refused(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["", "--preset=tiny", "--steps=2"])
    with pytest.raises(SystemExit):
        train_throughput.main()
    assert "--steps 2: leaves none after the warm-up" in capsys.readouterr().err
