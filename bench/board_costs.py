"""Measure what a step of every variant of the board costs: its time, and the memory of its state.

    python -m bench.board_costs --out bench/results/board_costs.json
    python -m bench.board_costs --task humanoid --out bench/results/board_costs_humanoid.json

The models, settings and batches are those of the board (studies/board/stages.py): of `pdfa`, and so
of `ctrl` and `nav`, whose language model has the same size, or of the clones of `humanoid`. All
variants train in one process and take turns of one step, as in bench.step_overhead; a round has
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
from studies.humanoid.cloning import Scaling, make_network
from studies.humanoid.task import Humanoid
from studies.sweep.compare import parse, study_of
from studies.sweep.optimizers import build, precondition, step
from studies.sweep.trial import Trial
from studies.sweep.variants import FAST_DOPR
from trainer.build import make_optimizers, make_preconditioner
from trainer.config import load_config
from trainer.presets import DOPR_KEYS

VOCABULARY = 11  # of `pdfa`


class BoardVariant(StepVariant):
    """A model and its optimizers, as a run of the board has them."""

    preconditioner: ActivationPreconditioner | None = None

    @property
    def n_bytes(self) -> int:
        """Memory of the optimizers' and the preconditioner's state, in bytes."""
        layers = self.preconditioner.layers if self.preconditioner else []
        return state_bytes(self.optimizers) + sum(layer.n_bytes for layer in layers)


class LanguageModelVariant(BoardVariant):
    """A language model of the task `pdfa`."""

    def __init__(self, trial: Trial) -> None:
        self.config = config = load_config(trial.command[1:], lambda settings: [])[0]
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


class CloneVariant(BoardVariant):
    """A clone of the task `humanoid`, on one batch of demonstrations."""

    def __init__(self, trial: Trial) -> None:
        from studies.humanoid.demonstrations import demonstrations_of  # requires the simulator

        task, settings = trial.task, trial.settings
        assert isinstance(task, Humanoid)
        data, batch = demonstrations_of(task), slice(task.batch_size)
        scaling = Scaling.of(data.observations, data.actions)
        self.x = scaling.inputs(data.observations[batch])  # (b, k)
        self.y = scaling.targets(data.actions[batch])  # (b, 17)
        self.model = make_network(self.x.shape[1], self.y.shape[1], task.width, seed=0)
        self.optimizers = build(
            *(self.model, settings["optimizer"], trial.lr, {}, settings.get("optimizer_args", ""))
        )
        dopr = {key: settings[key] for key in DOPR_KEYS if key in settings}
        if settings["dopr"]:
            self.preconditioner = precondition(self.model, self.optimizers, dopr)
        self.refresh_every, self.resident = FAST_DOPR["refresh_every"], 0
        self.round()

    def step(self) -> None:
        (self.model(self.x) - self.y).square().mean().backward()
        step(self.optimizers, 1)


VARIANTS = {"pdfa": LanguageModelVariant, Humanoid.name: CloneVariant}


def state_bytes(optimizers: Iterable[Optimizer]) -> int:
    """Return the bytes of all tensors in the states, each counted once, without the parameters."""
    leaves = tree_leaves([dict(optimizer.state) for optimizer in optimizers])
    storages = [each.untyped_storage() for each in leaves if isinstance(each, Tensor)]
    return sum({each.data_ptr(): each.nbytes() for each in storages}.values())


def measure(task: str, bases: Iterable[str], rounds: int) -> list[dict[str, Any]]:
    """Return a row for each optimizer, without DoPr and with it; all are measured in turns."""
    variants: dict[str, BoardVariant] = {}
    for base in bases:
        study = study_of(parse(stage(task, base).argv(Path("unused"), 1))[1])
        for variant in study.variants:
            trial = study.trial(variant, "fresh", study.first_rates(variant)[0], 0)
            variants[variant.name] = VARIANTS[task](trial)
    ms = in_turns({**variants}, rounds)["step_ms"]
    return [
        {"variant": name, "ms": ms[name], "MiB": variant.n_bytes / 2**20}
        for name, variant in variants.items()
    ]


def main() -> None:
    parser = bench_parser("board_costs", __doc__, rounds=5)
    parser.add_argument("--bases", nargs="+", default=BASES, help="default: all of the board")
    parser.add_argument("--task", choices=VARIANTS, default="pdfa", help="default: pdfa")
    arguments = parser.parse_args()
    with reported_errors(parser):
        rows = measure(arguments.task, arguments.bases, arguments.rounds)
    for row in rows:
        print(f"{row['variant']:50} {row['ms']:8.2f} ms  {row['MiB']:8.3f} MiB")
    write_rows(arguments.out, facts(DEVICE), rows)


if __name__ == "__main__":
    main()
