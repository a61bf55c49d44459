"""Compare fine-tuning with and without DoPr by what the models generate.

    python -m studies.finetune.study --out studies/results/finetune.json --pretrained FOLDER

docs/log/2026-11-29-finetuning.md contains the protocol. FOLDER is that of pretrain.py, which runs
first if it is missing. Learning rates are tuned by the teacher-forced loss on the tuning seed; the
other seeds are reported. One thread does everything, and runs in the file are not repeated.
"""

import copy
import math
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch

from data.files import sha256_of
from eval.command import at_least, command_parser, output_file, reported_errors
from eval.hf import WEIGHTS
from eval.rollout.intervals import Estimate
from eval.tables import markdown
from studies.finetune.arithmetic import train_and_test
from studies.finetune.grade import grade, loss_per_token
from studies.finetune.models import context_length, load
from studies.finetune.pretrain import pretrain
from studies.finetune.questions import encode, padding_id
from studies.finetune.train import DivergedError, Settings, dopr_settings, finetune
from studies.rows import Results, Row
from studies.stats.seeds import over_seeds
from studies.sweep.study import best_rate, search_rates

FAST = dopr_settings("fast", 0.1)
VARIANTS: dict[str, dict[str, Any]] = {  # settings of a fine-tuning
    "adamw": {"optimizer": "adamw"},
    "dopr-adamw": {"optimizer": "adamw", "dopr": FAST},
    "muon": {"optimizer": "muon"},
    "dopr-muon": {"optimizer": "muon", "dopr": FAST},
    "lora-adamw": {"optimizer": "adamw", "lora_rank": 8},
    "lora-dopr-adamw": {"optimizer": "adamw", "lora_rank": 8, "dopr": FAST},
}
PAIRS = {  # what is compared with its base, and the first grid of rates of both
    "dopr-adamw": ("adamw", (1e-3, 2e-3, 4e-3)),
    "dopr-muon": ("muon", (4e-3, 8e-3, 1.6e-2)),
    "lora-dopr-adamw": ("lora-adamw", (4e-3, 8e-3, 1.6e-2)),
}
TUNING_SEED, FIRST_SEED, N_SEEDS = 0, 100, 8
SIZES = {"n_train": 960, "n_test": 200, "steps": 60, "batch_size": 16}
SAMPLES = 8
METRICS = ("loss", "greedy", "sampled", f"pass@{SAMPLES}")
PROTOCOL = {"variants": VARIANTS, "samples": SAMPLES, **SIZES}


class Run(NamedTuple):
    """The settings that determine a run. The seed draws the questions and their order."""

    variant: str
    lr: float
    seed: int


class FinetuneResults(Results[Run, Row]):
    """The rows of finished runs in a JSON file."""

    list_name = "rows"
    optimizers = ("adamw", "muon")

    def __init__(self, path: Path, pretrained: Path) -> None:
        """Raises ValueError if the file contains results of another protocol."""
        super().__init__(path, PROTOCOL | {"pretrained_sha256": sha256_of(pretrained / WEIGHTS)})
        self.model, self.tokenizer = load(pretrained)

    def make(self, run: Run) -> Row:
        row = {**run._asdict(), **self._train_and_grade(run)}
        print(row, flush=True)
        return row

    def encode(self, run: Run, value: Row) -> Row:
        return value

    def decode(self, entry: Row) -> tuple[Run, Row]:
        return Run(*(entry[key] for key in Run._fields)), entry

    def _train_and_grade(self, run: Run) -> dict[str, float | None]:
        """Return the metrics; only the loss for the tuning seed, which is None after divergence."""
        train, test = train_and_test(run.seed, SIZES["n_train"], SIZES["n_test"])
        examples = encode(train, self.tokenizer, context_length(self.model))
        sizes = {key: SIZES[key] for key in ("steps", "batch_size")}
        settings = Settings(run.lr, seed=run.seed, **sizes, **VARIANTS[run.variant])
        model, pad_id = copy.deepcopy(self.model), padding_id(self.tokenizer)
        try:
            model, losses = finetune(model, examples, settings, pad_id, show=lambda line: None)
        except DivergedError:
            return {"loss": None}
        if run.seed == TUNING_SEED:
            tested = encode(test, self.tokenizer)
            return {"loss": loss_per_token(model, tested, pad_id, 64)}
        longest = max(len(each.answer) for each in examples)
        how = {"max_new_tokens": longest + 4, "batch_size": 800, "seed": run.seed}
        found = grade(model, self.tokenizer, test, samples=SAMPLES, **how)
        return {**found, "train_loss": losses[-1]}


class Pair:
    """A variant with DoPr and its base: their rates, and their rows on the reported seeds."""

    def __init__(self, results: FinetuneResults, name: str, first_seed: int = FIRST_SEED) -> None:
        self.name, (self.base, grid) = name, PAIRS[name]

        def tune(variant: str) -> float:
            def loss_of(lr: float) -> float:
                loss = results.of(Run(variant, lr, TUNING_SEED))["loss"]
                return loss if loss is not None and math.isfinite(loss) else math.inf

            return best_rate(search_rates(loss_of, grid, variant))

        self.rates = {variant: tune(variant) for variant in (self.base, name)}
        lr = self.rates[name]
        runs = {"own": (name, lr), "base": (self.base, self.rates[self.base])}
        runs["base at this rate"] = (self.base, lr)
        self.rows: dict[str, list[Row]] = {role: [] for role in runs}
        for seed in range(first_seed, first_seed + N_SEEDS):
            for role, run in runs.items():
                self.rows[role].append(results.of(Run(*run, seed)))

    def mean(self, role: str, metric: str) -> Estimate:
        return over_seeds([row[metric] for row in self.rows[role] if row["loss"] is not None])

    def difference(self, role: str, metric: str) -> Estimate:
        """Return the variant less its base, paired by seed; diverged runs are left out."""
        pairs = zip(self.rows["own"], self.rows[role], strict=True)
        pairs = [(a, b) for a, b in pairs if None not in (a["loss"], b["loss"])]
        return over_seeds([a[metric] - b[metric] for a, b in pairs])


def tables(pairs: list[Pair]) -> str:
    """Return the means over seeds, and the differences with 95 % intervals."""
    means, differences = [], []
    for each in pairs:
        for role, name in (("base", each.base), ("own", each.name)):
            cells = (f"{each.mean(role, metric).mean:.3f}" for metric in METRICS)
            means.append((name, f"{each.rates[name]:g}", *cells))
        for role, name in (("base", each.base), ("base at this rate", f"{each.base}, same rate")):
            cells = (_signed(each.difference(role, metric)) for metric in METRICS)
            differences.append((each.name, name, *cells))
    header = [("", "lr", *METRICS), ("", "less", *METRICS)]
    return "\n\n".join(map(markdown, header, (means, differences)))


def _signed(found: Estimate) -> str:
    missing = f" ({found.n} seeds)" if found.n < N_SEEDS else ""
    return f"{found.mean:+.3f} [{found.lo:+.3f}, {found.hi:+.3f}]{missing}"


def main(argv: list[str] | None = None) -> None:
    parser = command_parser("studies.finetune.study", __doc__)
    parser.add_argument("--out", type=output_file, required=True)
    parser.add_argument("--pretrained", type=Path, default=Path("out/finetune"))
    parser.add_argument("--pairs", default=",".join(PAIRS), help="names, with commas")
    parser.add_argument("--first_seed", type=int, default=FIRST_SEED, help=f"of {N_SEEDS}")
    arguments = parser.parse_args(argv)
    names = arguments.pairs.split(",")
    if unknown := {*names} - {*PAIRS}:
        parser.error(f"--pairs: {', '.join(sorted(unknown))} unknown; there are {', '.join(PAIRS)}")
    torch.set_num_threads(1)
    with reported_errors(parser):
        at_least(TUNING_SEED + 1, first_seed=arguments.first_seed)
        folder = arguments.pretrained / "model"
        if not (folder / WEIGHTS).exists():
            pretrain(arguments.pretrained, 0, [])
        results = FinetuneResults(arguments.out, folder)
        print(tables([Pair(results, name, arguments.first_seed) for name in names]))


if __name__ == "__main__":
    main(sys.argv[1:])
