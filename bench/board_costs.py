"""Measure what a step of every variant of the board costs: its time, and the memory of its state.

    python -m bench.board_costs [--rounds 5] [--out bench/results/board_costs.json]

The models, settings and batches are those of the board's language tasks (studies/board/stages.py).
All variants train in one process and take turns of one step; a round has ten, from one refresh of
DoPr to the next. The state is all tensors of the optimizers and of the preconditioner.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from bench.arguments import bench_parser
from bench.results import write_rows
from bench.timing import compared, facts, milliseconds
from eval.command import reported_errors
from studies.board.stages import BASES, stage
from studies.sweep.compare import parse, study_of
from studies.sweep.study import Study
from studies.sweep.variants import Variant
from trainer.build import make_model, make_optimizers, make_preconditioner
from trainer.config import load_config

CPU = torch.device("cpu")
TASK, VOCABULARY = "pdfa", 11
EVERY = 10  # steps between two refreshes of DoPr


class BoardVariant:
    """A model and its optimizers, as a run of the board has them."""

    def __init__(self, study: Study, variant: Variant) -> None:
        lr = study.first_rates(variant)[0]
        command = study.trial(variant, "fresh", lr, 0).command
        config, _ = load_config(command[1:], lambda settings: [])
        self.model = make_model(config, VOCABULARY)
        self.optimizers = make_optimizers(config, self.model, None)
        self.preconditioner = make_preconditioner(config, self.model) if config.dopr else None
        if self.preconditioner:
            self.preconditioner.attach(*self.optimizers)
        tokens = torch.randint(VOCABULARY, (config.batch_size, config.block_size + 1))
        self.x, self.y = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
        for _ in range(EVERY):  # creates the state
            self.step()

    def step(self) -> None:
        _, loss = self.model(self.x, self.y, return_logits=False)
        (loss / self.y.numel()).backward()
        for optimizer in self.optimizers:
            optimizer.step()
        self.model.zero_grad()

    @property
    def n_bytes(self) -> int:
        """Memory of the optimizers' and the preconditioner's state, in bytes."""
        layers = self.preconditioner.layers if self.preconditioner else []
        return state_bytes(self.optimizers) + sum(layer.n_bytes for layer in layers)


def state_bytes(optimizers: Iterable[Optimizer]) -> int:
    """Return the bytes of all tensors in the states, each counted once, without the parameters."""
    found: dict[int, int] = {}

    def visit(value: Any) -> None:
        if isinstance(value, Tensor):
            found[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
        elif isinstance(value, dict):
            for each in value.values():
                visit(each)
        elif isinstance(value, (list, tuple)):
            for each in value:
                visit(each)

    for optimizer in optimizers:
        visit(dict(optimizer.state))
    return sum(found.values())


def measure(bases: Iterable[str], rounds: int) -> list[dict[str, Any]]:
    """Return a row for each optimizer, without DoPr and with it; all are measured in turns."""
    variants: dict[str, BoardVariant] = {}
    for base in bases:
        study = study_of(parse(stage(TASK, base).argv(Path("unused"), 1))[1])
        variants |= {each.name: BoardVariant(study, each) for each in study.variants}
    times: dict[str, list[float]] = {name: [0.0] * rounds for name in variants}
    for i in range(rounds):
        for _ in range(EVERY):
            for name, variant in variants.items():
                times[name][i] += milliseconds(variant.step, CPU) / EVERY
    ms = compared(times)["ms"]
    return [
        {"variant": name, "ms": ms[name], "MiB": variant.n_bytes / 2**20}
        for name, variant in variants.items()
    ]


def main() -> None:
    parser = bench_parser("board_costs", __doc__, rounds=5)
    parser.add_argument("--bases", nargs="+", default=BASES, help="default: all of the board")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    with reported_errors(parser):
        rows = measure(arguments.bases, arguments.rounds)
    for row in rows:
        print(f"{row['variant']:50} {row['ms']:8.2f} ms  {row['MiB']:8.3f} MiB")
    write_rows(arguments.out, facts(CPU), rows)


if __name__ == "__main__":
    main()
