"""Test the commands that measure the agreement of steps, of clones and of language models."""

import pytest

from studies.step_noise import checkpoint, humanoid
from tests.studies.humanoid.small import SPEC
from tests.tiny import argv
from train import main as train


def rows_of(capsys):
    """Return the values of each layer in the printed table."""
    found = {}
    for row in capsys.readouterr().out.splitlines()[2:]:
        name, *values = (cell.strip("` ") for cell in row.split("|")[1:-1])
        found[name] = [float(each) for each in values]
    return found


def test_every_layer_of_a_clone_is_measured(capsys):
    humanoid.main(["--task", SPEC, "--steps", "3"])
    rows = rows_of(capsys)
    assert rows.keys() == {"0", "2", "4", "6"}
    for values in rows.values():
        assert all(0 < value < 1 for value in values)


def test_every_layer_in_the_blocks_of_a_language_model_is_measured(capsys, dataset, tmp_path):
    train(argv(dataset, tmp_path / "run", max_steps=3))
    capsys.readouterr()
    checkpoint.main([str(tmp_path / "run")])
    rows = rows_of(capsys)
    assert len(rows) == 2 * 4  # attention's two layers and the MLP's, in two blocks
    for name, values in rows.items():
        assert name.startswith("transformer.h.")
        assert all(-0.1 < value < 1 for value in values)


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
