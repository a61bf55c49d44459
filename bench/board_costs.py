"""Measure what a step of every variant of the board costs: its time, and the memory of its state.

    python -m bench.board_costs [--rounds 5] [--out bench/results/board_costs.json]

The models, settings and batches are those of the board's language tasks (studies/board/stages.py).
All variants train in one process and take turns of one step, as in bench.step_overhead; a round has
ten, from one refresh of DoPr to the next. The state is all tensors of the optimizers and of the
preconditioner.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves

from bench.arguments import bench_parser
from bench.results import write_rows
from bench.step_overhead import StepPreset, StepVariant, in_turns
from bench.timing import DEVICE, facts
from eval.command import reported_errors
from model import GPT
from optim import ActivationPreconditioner
from studies.board.stages import BASES, stage
from studies.sweep.compare import parse, study_of
from trainer.build import make_optimizers, make_preconditioner
from trainer.config import load_config
from trainer.settings import TrainConfig

TASK, VOCABULARY = "pdfa", 11


class BoardVariant(StepVariant):
    """A model and its optimizers, as a run of the board has them."""

    def __init__(self, config: TrainConfig) -> None:
        self.config = config
        self.preconditioner: ActivationPreconditioner | None = None
        preset = StepPreset(
            widths=(config.n_embd,),
            n_layer=config.n_layer,
            head_width=config.n_embd // config.n_head,
            block_size=config.block_size,
            vocab_size=VOCABULARY,
            micro_batch_size=config.batch_size,
            accumulation=1,
            token_stride=1,
        )
        super().__init__(preset, config.n_embd, self._make)

    def _make(self, model: GPT) -> list[Optimizer]:
        optimizers = make_optimizers(self.config, model, None)
        if self.config.dopr:
            self.preconditioner = make_preconditioner(self.config, model)
            self.preconditioner.attach(*optimizers)
        return optimizers

    @property
    def n_bytes(self) -> int:
        """Memory of the optimizers' and the preconditioner's state, in bytes."""
        layers = self.preconditioner.layers if self.preconditioner else []
        return state_bytes(self.optimizers) + sum(layer.n_bytes for layer in layers)


def state_bytes(optimizers: Iterable[Optimizer]) -> int:
    """Return the bytes of all tensors in the states, each counted once, without the parameters."""
    leaves = tree_leaves([dict(optimizer.state) for optimizer in optimizers])
    storages = [each.untyped_storage() for each in leaves if isinstance(each, Tensor)]
    return sum({each.data_ptr(): each.nbytes() for each in storages}.values())


def measure(bases: Iterable[str], rounds: int) -> list[dict[str, Any]]:
    """Return a row for each optimizer, without DoPr and with it; all are measured in turns."""
    variants: dict[str, BoardVariant] = {}
    for base in bases:
        study = study_of(parse(stage(TASK, base).argv(Path("unused"), 1))[1])
        for variant in study.variants:
            lr = study.first_rates(variant)[0]
            command = study.trial(variant, "fresh", lr, 0).command
            config, _ = load_config(command[1:], lambda settings: [])
            variants[variant.name] = BoardVariant(config)
    ms = in_turns({**variants}, rounds)["step_ms"]
    return [
        {"variant": name, "ms": ms[name], "MiB": variant.n_bytes / 2**20}
        for name, variant in variants.items()
    ]


def main() -> None:
    parser = bench_parser("board_costs", __doc__, rounds=5)
    parser.add_argument("--bases", nargs="+", default=BASES, help="default: all of the board")
    arguments = parser.parse_args()
    with reported_errors(parser):
        rows = measure(arguments.bases, arguments.rounds)
    for row in rows:
        print(f"{row['variant']:50} {row['ms']:8.2f} ms  {row['MiB']:8.3f} MiB")
    write_rows(arguments.out, facts(DEVICE), rows)


if __name__ == "__main__":
    main()
