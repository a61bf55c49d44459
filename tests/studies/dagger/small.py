"""Make runs of DAgger and of cloning that take a second."""

from dataclasses import replace
from pathlib import Path

from eval.rollout.tasks.pdfa import Pdfa
from studies.dagger.comparison import Setup
from studies.sweep.trial import TrainTrial, Trial

TASK = Pdfa(states=4, alphabet=4, horizon=8, n_documents=64)
STEPS, BATCH_SIZE = 8, 4


def small_trial(folder: Path, variant: str, method: str, lr: float = 0.01) -> Trial:
    """Return the run of a combination on seed 0, with a small task, model and number of steps."""
    trial = Setup("pdfa", variant, method).trial("tuning", lr, 0, 4)
    sizes = TrainTrial.sizes(TASK, STEPS, BATCH_SIZE * TASK.context_tokens)
    model = {"n_layer": 1, "n_head": 1, "n_embd": 16, "eval_batches": 2}
    settings = trial.settings | sizes | model | {"max_steps": STEPS}
    return replace(trial, folder=folder / f"{variant}-{method}", task=TASK, settings=settings)
