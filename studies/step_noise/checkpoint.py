"""Measure how much of a language model's step all batches have in common; see agreement.py.

    python -m studies.step_noise.checkpoint out/run

loads the newest checkpoint of a run of train.py and reads the batches that the run would read next.
γ is the run's, and Σ counts every token, also one that the loss masks.
It keeps 64 gradients and covariances of every layer, so it is for small models.
"""

import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from torch import nn

from data.loader import Batch, train_batches
from eval.command import command_parser, reported_errors
from eval.rollout.tasks import open_data
from eval.run import Run, load_run
from studies.step_noise.agreement import N_BATCHES, Statistics, of_layers, statistics, table


def batches_of(run: Run, step: int) -> Iterator[list[Batch]]:
    """Return the whole batches of a run from a step on."""
    config = run.config
    return train_batches(
        open_data(config["dataset"]),
        batch_size=config["batch_size"],
        micro_batch_size=config["batch_size"],
        block_size=config["block_size"],
        seed=config["seed"],
        start_step=step,
    )


def statistics_of(run: Run, n_batches: int = N_BATCHES) -> list[Statistics]:
    """Return the statistics of the layers in the model's blocks on a run's next batches.

    Raises ValueError if the run is a folder of Hugging Face.
    """
    if not run.config:
        raise ValueError(f"{run.path} has no training data: it is a Hugging Face folder")
    model = run.model.double()
    names = [
        name
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear) and name.startswith("transformer.h.")
    ]
    return [
        statistics(model, names, lambda x=x, y=y: model(x, y)[1])
        for [(x, y)] in islice(batches_of(run, run.step), n_batches)
    ]


def main(argv: list[str]) -> None:
    parser = command_parser("studies.step_noise.checkpoint", __doc__)
    parser.add_argument("run", type=Path, help="out_dir of a run, or a checkpoint's folder")
    arguments = parser.parse_args(argv)
    with reported_errors(parser):
        run = load_run(arguments.run)
        print(table(of_layers(statistics_of(run), run.config["gamma"])))


if __name__ == "__main__":
    main(sys.argv[1:])
