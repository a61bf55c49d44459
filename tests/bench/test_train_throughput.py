"""Tests of the comparison with nanoGPT, using a stand-in for nanoGPT's sources."""

import io
import json
from contextlib import redirect_stdout

import numpy as np
import pytest

from bench import train_throughput
from bench.train_throughput import PRESETS, prepare, run_nanogpt, run_ours
from trainer.config import load_config

# The settings of nanoGPT's train.py and their types. Its configurator.py accepts no others.
NANOGPT = {
    **{
        "dataset": str,
        "device": str,
        "dtype": str,
        "compile": bool,
        "bias": bool,
        "dropout": float,
    },
    **dict.fromkeys(("n_layer", "n_head", "n_embd", "block_size", "batch_size"), int),
    **dict.fromkeys(("gradient_accumulation_steps", "max_iters", "lr_decay_iters"), int),
    **dict.fromkeys(("warmup_iters", "log_interval", "eval_iters", "eval_interval"), int),
}
STAND_IN = f"""
import ast, pickle, sys
known = { ({key: kind.__name__ for key, kind in NANOGPT.items()})!r}
settings = {{}}
for argument in sys.argv[1:]:
    key, value = argument[2:].split("=")
    try:
        value = ast.literal_eval(value)
    except (SyntaxError, ValueError):
        pass
    assert type(value).__name__ == known[key], argument
    settings[key] = value
with open(f"data/{{settings['dataset']}}/meta.pkl", "rb") as file:
    meta = pickle.load(file)
tokens = settings["batch_size"] * settings["gradient_accumulation_steps"] * settings["block_size"]
for i in range(settings["max_iters"] + 1):
    ms = 1e6 if i < 4 else meta["vocab_size"] * tokens
    print(f"iter {{i}}: loss 1.0000, time {{ms:.2f}}ms, mfu 1.00%")
"""


@pytest.fixture
def nanogpt(tmp_path):
    folder = tmp_path / "nanoGPT"
    folder.mkdir()
    for name, text in {"train.py": STAND_IN, "model.py": "", "configurator.py": ""}.items():
        (folder / name).write_text(text)
    return folder


def quick_train_py(settings, cwd):
    """Do what train.py and the stand-in do, without training and without a process."""
    words = [f"--{key}={value}" for key, value in settings.items()]
    if cwd.name == "nanogpt":
        with redirect_stdout(io.StringIO()) as printed, pytest.MonkeyPatch.context() as patch:
            patch.chdir(cwd)
            patch.setattr("sys.argv", ["", *words])
            exec((cwd / "train.py").read_text(), {})
        return printed.getvalue()
    config, _ = load_config(words)
    settings["out_dir"].mkdir()
    times = [1e6] * 4 + [7.0] * (config.max_steps - 4)
    rows = [{"kind": "train", "step_ms": ms, "mfu": None} for ms in times]
    (settings["out_dir"] / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))


@pytest.mark.parametrize(
    "is_quick", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["quick", "real"]
)
def test_both_trainers_are_timed_without_their_warm_up(nanogpt, tmp_path, monkeypatch, is_quick):
    if is_quick:
        monkeypatch.setattr(train_throughput, "run_train_py", quick_train_py)
    out = tmp_path / "result.json"
    arguments = ["", "--preset=tiny", "--rounds=1", f"--nanogpt={nanogpt}", f"--out={out}"]
    monkeypatch.setattr("sys.argv", arguments)
    train_throughput.main()
    (row,) = json.loads(out.read_text())["rows"]
    assert row["tokens"] == 4 * 8
    # nanoGPT pads 301 ids to 320. The stand-in takes 320 * 32 ms per step after the warm-up.
    assert row["step_ms"]["nanogpt"] == [320 * 32]
    assert row["tokens_per_s"]["nanogpt"] == 1e3 * 32 / (320 * 32)
    assert 0.1 < row["step_ms"]["ours"][0] < 1e4
    assert row["ratio"] == row["step_ms"]["nanogpt"][0] / row["step_ms"]["ours"][0]


@pytest.mark.parametrize("preset", PRESETS.values(), ids=PRESETS)
def test_both_trainers_get_the_same_settings(preset, nanogpt, tmp_path, monkeypatch):
    given = []

    def start(settings, cwd):
        given.append(settings)
        raise InterruptedError

    monkeypatch.setattr(train_throughput, "run_train_py", start)
    (tmp_path / "nanogpt/data/corpus").mkdir(parents=True)
    for work in ((run_ours, preset, 0), (run_nanogpt, preset, 301)):
        with pytest.raises(InterruptedError):
            work[0](tmp_path, *work[1:])
    ours, theirs = given
    assert {k: NANOGPT[k](v) for k, v in theirs.items()} == theirs
    for key in ("n_layer", "n_head", "n_embd", "block_size", "device"):
        assert ours[key] == theirs[key]
    assert ours["batch_size"] == theirs["batch_size"] * theirs["gradient_accumulation_steps"]
    assert ours["micro_batch_size"] == theirs["batch_size"]
    assert (ours["max_steps"], ours["log_every"]) == (theirs["max_iters"], theirs["log_interval"])
    assert (ours.get("compile") == "true") == theirs["compile"] == preset.compile_in_bf16


def test_our_step_time_is_the_median_after_the_warm_up(tmp_path, monkeypatch):
    def start(settings, cwd):
        settings["out_dir"].mkdir()
        rows = [{"kind": "train", "step_ms": ms, "mfu": ms / 100} for ms in (*[900] * 4, 3, 1, 2)]
        text = "\n".join(map(json.dumps, rows))
        (settings["out_dir"] / "metrics.jsonl").write_text(text)

    monkeypatch.setattr(train_throughput, "run_train_py", start)
    assert run_ours(tmp_path, PRESETS["tiny"], 0) == (2, 0.02)


def test_a_folder_without_nanogpt_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["", "--preset=tiny", f"--nanogpt={tmp_path}"])
    with pytest.raises(SystemExit):
        train_throughput.main()
    assert f"{tmp_path}: contains no train.py; give a nanoGPT checkout" in capsys.readouterr().err


def test_both_trainers_get_the_same_ids(tmp_path):
    assert prepare(tmp_path, PRESETS["tiny"]) == 301
    theirs = np.fromfile(tmp_path / "nanogpt/data/corpus/train.bin", dtype=np.uint16)
    ours = np.fromfile(tmp_path / "ours/train_000000.bin", dtype=np.uint16)[-len(theirs) :]
    np.testing.assert_array_equal(ours, theirs)
    assert len(theirs) > 15_000


def test_a_run_without_steps_after_the_warm_up_is_refused(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["", "--preset=tiny", "--steps=4"])
    with pytest.raises(SystemExit):
        train_throughput.main()
    assert "--steps 4: only covers the warm-up; use at least 5" in capsys.readouterr().err
