"""Run DAgger once: train a model partly on its own episodes, grade it, and store its record."""

import math
from dataclasses import asdict
from typing import Any

import torch

from eval.rollout.record import make_record
from eval.rollout.ttf import grade_model
from studies.dagger.training import ROUNDS, OwnEpisodes, train, validation_loss
from studies.sweep.trial import TrainTrial
from trainer.config import load_config
from trainer.provenance import provenance

# Share of the model's own episodes in a batch, rounded down to whole sequences. The oracle's
# documents never repeat, so their number sets no share; with a half, neither kind dominates.
OWN_SHARE = 0.5


class DaggerTrial(TrainTrial):
    """A transformer that is also trained on its own episodes, graded on its rollouts.

    A round collects as many episodes as its batches hold, so the oracle labels as many sequences as
    in the ordinary run with the same settings.
    """

    def model_identity(self) -> dict[str, Any]:
        return super().model_identity() | {"dagger_rounds": ROUNDS, "own_share": OWN_SHARE}

    def make(self) -> dict[str, Any]:
        config, _ = load_config(self.command[1:])
        n_own = int(OWN_SHARE * config.batch_size)
        n_episodes = n_own * config.max_steps // ROUNDS
        own, grade = OwnEpisodes(self.task, self.seed), None
        model = train(config, own, n_own, n_episodes)
        loss = validation_loss(config, self.task, model) if model else math.nan
        if model and math.isfinite(loss):
            grade = grade_model(self.task, model, n=self.n, seed=self.grading_seed).to_json()
        return make_record(
            self.task,
            asdict(config),
            steps=config.max_steps,
            val_loss=loss,
            grade=grade and grade | {"samples": []},
            label_share=own.label_share(),
            environment=provenance(torch.device("cpu")),
        )
