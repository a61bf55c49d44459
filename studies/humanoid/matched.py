"""Compare clones with and without DoPr at equal validation loss.

    python -m studies.humanoid.matched --out FILE --optimizers adamw,muon --experts walk-0,walk-1

Every optimizer trains for several numbers of steps, each with its own schedule and with a learning
rate that is tuned on one seed by validation loss. On each fresh seed, the runs without DoPr give
the return as a function of the logarithm of the validation loss, interpolated linearly. A run with
DoPr is compared with that function at its own validation loss, and only inside the range of the
runs without DoPr. Finished runs are not repeated, and the rows of earlier commands in FILE are
kept. With --show, nothing runs and the rows in FILE are printed.

With --rate_factor 0.5, only the optimizers without DoPr run, at half of their tuned rates, to see
whether another rate than the one that validation chooses gives a better return at an equal loss.
The lines below the table say so; the table has the tuned rates alone.
"""

from argparse import Namespace
from dataclasses import dataclass
from itertools import product

import numpy as np

from eval.command import reported_errors
from eval.rollout.intervals import Estimate
from eval.tables import markdown
from studies.humanoid.tables import with_half
from studies.humanoid.task import Humanoid
from studies.humanoid.trial import HumanoidTrial
from studies.optimizer_table import ROOT
from studies.pool import pool_parser
from studies.rows import Row, add_rows, load_rows
from studies.stats.equal_loss import difference_at_equal, over_lengths
from studies.stats.seeds import over_seeds
from studies.sweep.study import Study, sweep
from studies.sweep.trial import run_trial
from studies.sweep.variants import FAST_PREFIX

RUNS = ROOT / "out" / "humanoid_matched"
STEPS = {  # without and with DoPr
    False: (500, 1000, 2000, 4000, 8000, 16_000),
    True: (500, 1000, 2000, 4000),
}
FRESH_SEEDS = 8
METRICS = (
    *("val_loss", "return", "falls", "length"),
    *(f"action_error_steps_{window}" for window in ("0-20", "20-40", "40-60")),
)


@dataclass(frozen=True)
class Setup:
    """A row of the comparison: the expert, the variant, and the number of steps.

    Its rate is the tuned one times `rate_factor`.
    """

    expert: str
    variant: str
    steps: int
    rate_factor: float = 1.0

    def study(self, n: int) -> Study:
        """Return the study of this variant alone, with n graded episodes of each run."""
        return Study(
            out=RUNS / f"{self.expert}-{self.steps}",
            task=Humanoid(expert=self.expert),
            variants=(HumanoidTrial.parse_variant(self.variant),),
            steps=self.steps,
            tuning_seeds=1,
            fresh_seeds=FRESH_SEEDS,
            n=n,
            settings={},
        )


def measure(setup: Setup) -> Row:
    """Tune the rate, run the fresh seeds and return a row with the metrics of each seed.

    Raises RuntimeError if a run diverges at the tuned rate.
    """
    tuning, study = setup.study(1), setup.study(Humanoid.default_episodes)
    variant = study.variants[0]
    tuned = sweep(tuning, variant, lambda trials: [run_trial(trial) for trial in trials])
    lr = setup.rate_factor * tuned
    trials = [study.trial(variant, "fresh", lr, seed) for seed in study.seeds]
    grades = [run_trial(trial)["grade"] for trial in trials]
    if None in grades:
        raise RuntimeError(f"{setup}: a run diverged at the rate {lr:g}, which did not on seed 0")
    metrics = {key: [grade["metrics"][key]["mean"] for grade in grades] for key in METRICS}
    survival = np.mean([grade["curves"]["survival"]["mean"] for grade in grades], axis=0)
    names = {"expert": setup.expert, "variant": setup.variant, "steps": setup.steps, "lr": lr}
    if setup.rate_factor != 1:
        names["rate_factor"] = setup.rate_factor
    return names | metrics | {"survival": survival.round(4).tolist()}


def key_of(row: Row) -> Setup:
    return Setup(row["expert"], row["variant"], row["steps"], row.get("rate_factor", 1.0))


def difference(row: Row, bases: list[Row], key: str) -> list[float]:
    """Return the metric `key` minus that of the base at equal validation loss, for each seed.

    NaN where the validation loss lies outside the range of the base's runs.
    """
    return [
        difference_at_equal(
            np.log(row["val_loss"][seed]),
            row[key][seed],
            [(np.log(base["val_loss"][seed]), base[key][seed]) for base in bases],
        )
        for seed in range(FRESH_SEEDS)
    ]


def pooled(rows: list[Row], bases: list[Row], key: str) -> Estimate:
    """Return the difference at equal validation loss, the mean over rows and then over seeds.

    A seed counts with those of its rows whose loss lies in the range of the base's runs.
    """
    return over_lengths(zip(*(difference(row, bases, key) for row in rows), strict=True))


def bases_of(row: Row, rows: list[Row], rate_factor: float = 1.0) -> list[Row]:
    """Return the rows of the same expert and optimizer without DoPr."""
    name = row["variant"].removeprefix(FAST_PREFIX)
    wanted = row["expert"], name, rate_factor
    return [
        each
        for each in rows
        if (each["expert"], each["variant"], each.get("rate_factor", 1.0)) == wanted
    ]


def table_of(rows: list[Row]) -> str:
    """Return a line for every row at its tuned rate.

    Those with DoPr are compared at equal validation loss.
    """
    cells = []
    for row in rows:
        if key_of(row).rate_factor != 1:
            continue
        names = (row["expert"], f"`{row['variant']}`", f"{row['steps']:,}", f"{row['lr']:g}")
        means = (f"{np.mean(row['val_loss']):.5f}", with_half(over_seeds(row["return"]), ",.0f"))
        falls, compared = f"{np.mean(row['falls']):.2f}", ()
        if row["variant"].startswith(FAST_PREFIX):
            bases = bases_of(row, rows)
            inside = int(np.isfinite(difference(row, bases, "return")).sum())
            compared = (str(inside), with_half(pooled([row], bases, "return"), "+,.0f"))
        cells.append((*names, *means, falls, *(compared or ("", ""))))
    header = ("expert", "optimizer", "steps", "lr", "val loss", "return", "falls")
    return markdown((*header, "seeds in range", "return minus base at equal loss"), cells)


def pooled_lines(rows: list[Row]) -> list[str]:
    """Return lines for every expert and optimizer: the difference over all numbers of steps."""
    lines = []
    for expert, name in dict.fromkeys((row["expert"], row["variant"]) for row in rows):
        own = [row for row in rows if (row["expert"], row["variant"]) == (expert, name)]
        if not name.startswith(FAST_PREFIX):
            continue
        for factor in sorted({row.get("rate_factor", 1.0) for row in rows}, reverse=True):
            if bases := bases_of(own[0], rows, factor):
                gain, falls = (pooled(own, bases, key) for key in ("return", "falls"))
                shown = f"{with_half(gain, '+,.0f')}, falls {with_half(falls, '+.2f')}"
                rates = "" if factor == 1 else f" (base at {factor:g} of its rate)"
                lines.append(f"{expert}, {name} at equal loss{rates}, {gain.n} seeds: {shown}")
    return lines


def run(arguments: Namespace, setups: list[Setup]) -> list[Row]:
    """Run the setups; return all rows of the file."""
    from studies.humanoid.grading import STRIDE  # requires the simulator

    for setup in setups:
        setup.study(1).check()
    return add_rows(
        *(arguments.out, measure, setups, key_of),
        workers=arguments.workers,
        header={"stride": STRIDE},
    )


def main() -> None:
    parser = pool_parser("studies.humanoid.matched", __doc__)
    parser.add_argument("--optimizers", default="adamw", help="comma-separated")
    parser.add_argument("--experts", default="walk-0,walk-1,walk-2", help="comma-separated")
    parser.add_argument("--show", action="store_true", help="run nothing, print the rows of FILE")
    parser.add_argument("--rate_factor", type=float, default=1.0, help="of the tuned rates")
    longest = max(STEPS[False])
    parser.add_argument(
        "--longest", type=int, default=longest, help="run and print only up to so many steps"
    )
    arguments = parser.parse_args()
    names = product(
        arguments.experts.split(","), arguments.optimizers.split(","), ("", FAST_PREFIX)
    )
    factor, longest = arguments.rate_factor, arguments.longest
    if not factor > 0:
        parser.error(f"--rate_factor {factor:g}: must be above 0")
    shortest = min(STEPS[False])
    if longest < shortest:
        parser.error(f"--longest {longest}: the shortest runs have {shortest} steps")
    if arguments.show and not arguments.out.exists():
        parser.error(f"--out {arguments.out}: there is no such file to show")
    setups = [
        Setup(expert, prefix + name, steps, factor)
        for expert, name, prefix in names
        for steps in STEPS[bool(prefix)]
        if steps <= longest and (factor == 1 or not prefix)
    ]
    with reported_errors(parser):
        rows = (
            [*load_rows(arguments.out, key_of).values()]
            if arguments.show
            else run(arguments, setups)
        )
        rows = [row for row in rows if row["steps"] <= longest]
        print(table_of(rows), *pooled_lines(rows), sep="\n")


if __name__ == "__main__":
    main()
