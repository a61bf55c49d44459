"""Measure how much of a clone's step all batches have in common; see agreement.py.

    python -m studies.step_noise.humanoid --task humanoid,expert=walk-2

trains a clone of a humanoid for a while by exact DoPr-AdamW at a constant rate, halts, and draws
batches of demonstrations at these weights. --out adds the table to a file.
"""

import sys
from operator import itemgetter
from pathlib import Path

import torch
from torch import nn

from eval.command import at_least, command_parser, positive_int, reported_errors
from eval.rollout.tasks import parse_task
from studies.humanoid.task import Humanoid
from studies.humanoid.trial import SCHEDULE, HumanoidTrial, clone_of
from studies.rows import check_header, write_rows
from studies.step_noise.agreement import (
    COLUMNS,
    N_BATCHES,
    Statistics,
    of_layers,
    statistics,
    table,
)
from studies.sweep.optimizers import default_settings

KEY = itemgetter("task", "seed")  # of a row in a file


def statistics_of(task: Humanoid, lr: float, steps: int, seed: int) -> list[Statistics]:
    """Train a clone. Return the statistics of its layers on batches of demonstrations.

    Raises ValueError if training diverges.
    """
    # They require the simulator.
    from studies.humanoid.demonstrations import demonstrations_of, labels_of

    settings = dict(HumanoidTrial.parse_variant("dopr-adamw").settings)
    settings |= {"max_steps": steps, SCHEDULE: "constant"}
    clone = clone_of(task, settings, lr, seed)
    if clone is None:
        raise ValueError(f"training diverged at --lr {lr:g}")
    data = demonstrations_of(task)
    network = clone.network.double()
    x = clone.scaling.inputs(data.observations).double()
    y = clone.scaling.targets(labels_of(task, data.actions)).double()
    generator = torch.Generator().manual_seed(seed)
    batches = torch.randint(len(x), (N_BATCHES, task.batch_size), generator=generator)
    names = [name for name, layer in network.named_modules() if isinstance(layer, nn.Linear)]
    return [
        statistics(network, names, lambda b=batch: (network(x[b]) - y[b]).square().mean())
        for batch in batches
    ]


def main(argv: list[str]) -> None:
    parser = command_parser("studies.step_noise.humanoid", __doc__)
    add = parser.add_argument
    add("--task", default="humanoid", help="humanoid,knob=value,...")
    add("--lr", type=float, default=2e-3)
    add("--steps", type=positive_int, default=300)
    add("--seed", type=int, default=0)
    add("--out", type=Path, help="JSON, to which other seeds and tasks can be added")
    arguments = parser.parse_args(argv)
    with reported_errors(parser):
        at_least(0, seed=arguments.seed)
        if not arguments.lr > 0:
            raise ValueError(f"--lr={arguments.lr:g}: must be above 0")
        task = parse_task(arguments.task, {Humanoid.name: Humanoid})
        header = {"lr": arguments.lr, "steps": arguments.steps, "columns": COLUMNS}
        if arguments.out:
            check_header(arguments.out, KEY, header)
        batches = statistics_of(task, arguments.lr, arguments.steps, arguments.seed)
        found = of_layers(batches, default_settings("adamw", has_dopr=True)["gamma"])
        print(table(found))
        if arguments.out:
            row = {"task": task.spec, "seed": arguments.seed, "agreements": found}
            write_rows(arguments.out, [row], KEY, header)


if __name__ == "__main__":
    main(sys.argv[1:])
