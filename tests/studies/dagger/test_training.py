"""Test that training equals that of train.py except for the model's own episodes."""

import pytest
import torch
from safetensors.torch import load_file

from studies.dagger.episodes import labelled_episodes
from studies.dagger.training import ROUNDS, OwnEpisodes, train, validation_loss
from studies.sweep.trial import run_trial
from tests.studies.dagger.small import BATCH_SIZE, STEPS, TASK, small_trial
from trainer.config import load_config

N = 5  # episodes of a round


def config_of(folder, variant="fast-dopr-adamw", lr=0.01):
    return load_config(small_trial(folder, variant, "DAgger", lr).command[1:])[0]


class Spy(OwnEpisodes):
    """Remember every batch, before and after, with the number of own episodes."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.seen = []

    def mix(self, batch, n):
        mixed = super().mix(batch, n)
        self.seen.append((len(self.x), batch, mixed))
        return mixed


@pytest.mark.parametrize("variant", ["adamw", "fast-dopr-adamw", "muon", "fast-dopr-muon"])
def test_without_own_episodes_training_equals_train_py_bit_for_bit(tmp_path, variant):
    trial = small_trial(tmp_path, variant, "cloning")
    record = run_trial(trial)
    weights = load_file(trial.folder / f"checkpoints/step-{STEPS:08d}/model.safetensors")
    config, own = config_of(tmp_path, variant), OwnEpisodes(TASK, 0)
    model = train(config, own, 0, N)
    assert len(own.x) == N * (ROUNDS - 1)  # they were collected, and changed nothing
    found = model.state_dict()
    assert found.keys() == weights.keys()
    assert all(found[name].equal(each) for name, each in weights.items())
    assert validation_loss(config, TASK, model) == record["val_loss"]


def test_own_episodes_accumulate_and_fill_a_part_of_each_batch(tmp_path):
    own = Spy(TASK, 0)
    train(config_of(tmp_path), own, 3, N)
    sizes = [size for size, *_ in own.seen]
    assert sizes == [0, 0, N, N, 2 * N, 2 * N, 3 * N, 3 * N]  # four rounds of two steps
    for size, *pair in own.seen:
        data, before, after = (torch.cat(rows, dim=1) for rows in ((own.x, own.y), *pair))
        n_own = 3 if size else 0
        assert after.shape == (BATCH_SIZE, 2 * TASK.context_tokens)
        assert after[n_own:].equal(before[n_own:])
        assert all((data[:size] == row).all(1).any() for row in after[:n_own])
    assert own.label_share() == 1  # no episode of pdfa ends
    rounds = own.x.split(N)
    assert not rounds[0].equal(rounds[1])


def test_every_round_has_episodes_of_its_own_with_the_starts_of_training(tmp_path, monkeypatch):
    streams = []

    def labelled(task, predictor, n, stream):
        streams.append(stream)
        return labelled_episodes(task, predictor, n, stream)

    monkeypatch.setattr("studies.dagger.training.labelled_episodes", labelled)
    train(config_of(tmp_path), OwnEpisodes(TASK, 0), 2, N)
    assert len({*streams} - {"train", "val"}) == ROUNDS - 1
    assert all(stream.startswith("train") for stream in streams)


def test_a_run_is_deterministic_and_own_episodes_change_it(tmp_path):
    config = config_of(tmp_path)
    first, again, cloning = (
        train(config, OwnEpisodes(TASK, 0), n_own, N).transformer.wte.weight for n_own in (2, 2, 0)
    )
    assert first.equal(again)
    assert not torch.allclose(first, cloning)


def test_a_run_that_diverges_has_no_model(tmp_path):
    assert train(config_of(tmp_path, "adamw", 1e30), OwnEpisodes(TASK, 0), 2, N) is None
