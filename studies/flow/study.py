"""Compare samples of flow models that were trained with and without DoPr.

    python -m studies.flow.study --out studies/results/flow.json [--targets cond-100,curve]

docs/log/2026-11-29-flow-matching.md contains the protocol. Learning rates are tuned by the excess
loss on the tuning seed; the other seeds are reported. One process with one thread does everything,
and runs that the file already holds are not repeated.
"""

import math
import sys
from pathlib import Path

from eval.command import command_parser
from studies.flow.comparison import Metrics
from studies.flow.runs import MODES, FlowResults, Run, use_one_thread
from studies.flow.table import means_table, ratios_table
from studies.flow.targets import make_target
from studies.sweep.study import best_rate, search_rates

TARGETS = ("cond-10000", "curve", "cond-100", "cond-1")
RATES = {  # the first grid; it grows by a factor of two while the best rate is at its edge
    "adamw": (2e-3, 4e-3, 8e-3),
    "muon": (8e-3, 1.6e-2, 3.2e-2),
}
TUNING_SEED, SEEDS = 0, (100, 101, 102, 103, 104)
STEPS = 500  # of the tuning runs, and of the comparisons at the tuned and at equal rates
DOPR_LENGTHS = {"fast": (250, 500), "exact": (250, 500)}
LENGTHS = {  # numbers of steps by optimizer and mode
    "adamw": {"base": (125, 250, 500, 1000, 2000), **DOPR_LENGTHS},
    "muon": {"base": (125, 250, 500, 1000), **DOPR_LENGTHS},
}
PROTOCOL = {
    **{"tuning_seed": TUNING_SEED, "seeds": SEEDS, "steps": STEPS},
    **{"lengths": LENGTHS, "modes": MODES},
}


class Comparison:
    """The runs of one optimizer on one target. Runs are made when they are first asked for."""

    def __init__(self, results: FlowResults, target: str, optimizer: str) -> None:
        self.results, self.target, self.optimizer = results, target, optimizer
        self.rates = {mode: self._tune(mode) for mode in MODES}

    def _tune(self, mode: str) -> float:
        """Return the rate with the lowest excess loss on the tuning seed."""

        def loss_of(lr: float) -> float:
            metrics = self._run(mode, lr, TUNING_SEED, STEPS)
            return metrics["excess"] if metrics else math.inf

        return best_rate(search_rates(loss_of, RATES[self.optimizer], mode))

    def _run(self, mode: str, lr: float, seed: int, steps: int) -> Metrics:
        return self.results.of(Run(self.target, self.optimizer, mode, lr, seed, steps))

    def at(self, mode: str, lr: float) -> list[Metrics]:
        """Return the metrics of every reported seed after STEPS steps."""
        return [self._run(mode, lr, seed, STEPS) for seed in SEEDS]

    def lengths(self, mode: str) -> list[list[Metrics]]:
        """Return the metrics of every reported seed and number of steps, at the tuned rate."""
        lr, lengths = self.rates[mode], LENGTHS[self.optimizer][mode]
        return [[self._run(mode, lr, seed, steps) for steps in lengths] for seed in SEEDS]


def compare(results: FlowResults, target: str) -> list[Comparison]:
    """Make all runs on a target. They are ordered by seed, so that each grader is built once."""
    comparisons = [Comparison(results, target, optimizer) for optimizer in RATES]
    for seed in SEEDS:
        for each in comparisons:
            for mode, lr in each.rates.items():
                for steps in LENGTHS[each.optimizer][mode]:
                    results.of(Run(target, each.optimizer, mode, lr, seed, steps))
                results.of(Run(target, each.optimizer, "base", lr, seed, STEPS))
    return comparisons


def finished_comparisons(results: FlowResults) -> list[Comparison]:
    """Return the comparisons on the targets whose last seed is among the results."""
    reached = {run.target for run in results.found if run.seed == SEEDS[-1]}
    return [each for name in TARGETS if name in reached for each in compare(results, name)]


def main(argv: list[str]) -> None:
    parser = command_parser("studies.flow.study", __doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--targets", default=",".join(TARGETS), help="names, with commas")
    arguments = parser.parse_args(argv)
    targets = arguments.targets.split(",")
    try:
        for target in targets:
            make_target(target, TUNING_SEED)
        results = FlowResults(arguments.out, PROTOCOL)
    except ValueError as error:
        parser.error(str(error))
    use_one_thread()
    comparisons = [each for target in targets for each in compare(results, target)]
    print(means_table(comparisons), ratios_table(comparisons), sep="\n\n")


if __name__ == "__main__":
    main(sys.argv[1:])
