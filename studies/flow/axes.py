"""Split the errors of DoPr-AdamW at equal excess loss by the axes of the data.

    python -m studies.flow.axes [--target cond-10000]

This is an exploration that was written after the results of study.py were seen. It trains the runs
of AdamW in studies/results/flow.json again, and compares parts of the paired error with the base at
equal excess loss: its parts along the thin and along the wide half of the axes, and the whitened
error, in which the error along each axis is divided by the variance of the data along it.
"""

import sys

import torch

from eval.command import command_parser
from eval.tables import markdown
from studies.flow.comparison import Metrics, as_ratio, matched
from studies.flow.figure import RESULTS
from studies.flow.grading import Grader, in_float32
from studies.flow.runs import MODES, FlowResults, Run, grader_of, use_one_thread
from studies.flow.sampling import Field, integrate
from studies.flow.study import LENGTHS, PROTOCOL, SEEDS, Comparison
from studies.flow.training import train_field

PARTS = ("excess", "thin", "wide", "whitened")


@torch.no_grad()
def split_by_axes(grader: Grader, field: Field) -> dict[str, float]:
    """Return the excess loss and the parts of the paired error.

    All components of the target must have the same axes.
    """
    mixture = grader.target.mixture
    axes, variances = mixture.axes[0], mixture.variances[0]  # in increasing order
    excess = field(grader.x, grader.t).double() - grader.velocity
    error = (integrate(field, grader.noise) - grader.exact) @ axes
    along = error.square().mean(0)  # (d,)
    half = len(along) // 2
    parts = (excess.square().sum(1).mean(), along[:half].sum(), along[half:].sum())
    whitened = (along / variances).mean()
    return dict(zip(PARTS, map(float, (*parts, whitened)), strict=True))


def measure(run: Run) -> Metrics:
    """Train the run again; return the parts of its errors, or None if it diverged."""
    grader = grader_of(run.target, run.seed)
    mixture, dopr = grader.target.mixture, MODES[run.mode]
    field = train_field(mixture, run.optimizer, run.lr, run.seed, run.steps, dopr)
    return split_by_axes(grader, in_float32(field)) if field else None


def main(argv: list[str]) -> None:
    parser = command_parser("studies.flow.axes", __doc__)
    parser.add_argument("--target", default="cond-10000", help="cond-C")
    target = parser.parse_args(argv).target
    if not target.startswith("cond-"):
        parser.error(f"--target {target}: must be cond-C, whose components share their axes")
    use_one_thread()
    rates = Comparison(FlowResults(RESULTS, PROTOCOL), target, "adamw").rates
    found: dict[str, list[list[Metrics]]] = {mode: [] for mode in MODES}
    for seed in SEEDS:
        for mode, lr in rates.items():
            runs = [Run(target, "adamw", mode, lr, seed, n) for n in LENGTHS["adamw"][mode]]
            found[mode].append([measure(run) for run in runs])
    rows = [
        (mode, *(as_ratio(matched(found[mode], found["base"], part)) for part in PARTS[1:]))
        for mode in MODES
        if mode != "base"
    ]
    print(markdown(("at equal excess", *PARTS[1:]), rows))


if __name__ == "__main__":
    main(sys.argv[1:])
