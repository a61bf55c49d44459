"""Test the commands that measure the agreement of steps, of clones and of language models."""

import json
from dataclasses import replace
from itertools import islice

import pytest
import torch

from eval.run import load_run
from studies.humanoid.trial import clone_of
from studies.step_noise import checkpoint, humanoid
from studies.step_noise.agreement import N_BATCHES, of_layers, statistics
from tests.studies.humanoid.small import SMALL, SPEC
from tests.tiny import argv
from train import main as train


def rows_of(capsys):
    """Return the values of each layer in the printed table."""
    found = {}
    for row in capsys.readouterr().out.splitlines()[2:]:
        name, *values = (cell.strip("` ") for cell in row.split("|")[1:-1])
        found[name] = [float(each) for each in values]
    return found


def test_every_layer_of_a_clone_is_measured_and_added_to_a_file(capsys, tmp_path):
    out = tmp_path / "rows.json"
    for seed in (0, 1):
        words = ["--task", SPEC, "--steps", "3", "--seed", str(seed), "--out", str(out)]
        humanoid.main(words)
        rows = rows_of(capsys)
        assert rows.keys() == {"0", "2", "4", "6"}
        for values in rows.values():
            assert all(0 < value < 1 for value in values)
    first, second = json.loads(out.read_text())["rows"]
    assert (first["seed"], second["seed"]) == (0, 1)
    assert {
        name: [round(x, 3) for x in each] for name, each in second["agreements"].items()
    } == rows
    with pytest.raises(SystemExit, match="2"):
        humanoid.main([*words, "--lr", "0.1"])
    assert "holds rows of another lr" in capsys.readouterr().err


def test_a_clone_trains_at_a_constant_rate_and_noise_in_the_labels_changes_only_g(monkeypatch):
    clone, asked = clone_of(SMALL, {"optimizer": "adamw", "max_steps": 2}, 1e-3, 0), []

    def trained(task, settings, lr, seed):
        asked.append((settings, lr, seed))
        return clone

    monkeypatch.setattr(humanoid, "clone_of", trained)
    noisy = replace(SMALL, label_noise=0.5)
    plain, other = (humanoid.statistics_of(task, 0.01, 7, 3) for task in (SMALL, noisy))
    (settings, lr, seed), _ = asked
    assert (settings["schedule"], settings["max_steps"], lr, seed) == ("constant", 7, 0.01, 3)
    assert settings["dopr"]
    assert settings["refresh_every"] == 1
    assert len(plain) == N_BATCHES
    for (G, sigma), (noisy_G, same_sigma) in zip(plain[0].values(), other[0].values(), strict=True):
        assert sigma.equal(same_sigma)
        assert not torch.allclose(G, noisy_G)


def test_every_layer_in_the_blocks_of_a_language_model_is_measured(capsys, dataset, tmp_path):
    train(argv(dataset, tmp_path / "run", max_steps=3, dopr=True, gamma=0.7))
    run = load_run(tmp_path / "run")
    expected = of_layers(checkpoint.statistics_of(run), 0.7)
    capsys.readouterr()
    checkpoint.main([str(tmp_path / "run")])
    rows = rows_of(capsys)
    assert {name: [round(x, 3) for x in each] for name, each in expected.items()} == rows
    assert len(rows) == 2 * 4  # attention's two layers and the MLP's, in two blocks
    for name, values in rows.items():
        assert name.startswith("transformer.h.")
        assert all(-0.1 < value < 1 for value in values)


def test_a_run_is_measured_on_the_batches_that_it_would_read_next(dataset, tmp_path):
    """The first batch after three steps is the fourth."""
    train(argv(dataset, tmp_path / "run", max_steps=3))
    run = load_run(tmp_path / "run")
    (found,) = checkpoint.statistics_of(run, 1)
    *_, [(x, y)] = islice(checkpoint.batches_of(run, 0), 4)
    names = list(found)
    G, sigma = statistics(run.model, names, lambda: run.model(x, y)[1])[names[0]]
    torch.testing.assert_close((G, sigma), found[names[0]])


def test_wrong_arguments_are_refused(capsys, tmp_path):
    for main, arguments, message in (
        (humanoid.main, ["--task", "humanoid,expert=run"], "expert=run: must be one of"),
        (humanoid.main, ["--task", SPEC, "--lr", "1e9"], "training diverged at --lr 1e+09"),
        (humanoid.main, ["--task", SPEC, "--lr", "0"], "--lr=0: must be above 0"),
        (humanoid.main, ["--task", SPEC, "--seed", "-1"], "seed"),
        (checkpoint.main, [str(tmp_path)], "no checkpoint"),
    ):
        with pytest.raises(SystemExit, match="2"):
            main(arguments)
        assert message in capsys.readouterr().err
