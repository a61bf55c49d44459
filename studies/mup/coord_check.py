"""Check muP's coordinates: training should move the activations equally at every width.

    python -m studies.mup.coord_check --optimizers adamw,dopr-adamw,muon --seeds 0,1,2

The command trains each width for a few steps without warm-up, decay or clipping. It fits slopes
against log2 width: of the log2 RMS of the activations (t = 0) and of their change since t = 0.
Under muP they should be zero; the standard parametrisation (sp) is the control and must fail the
check. The command writes records.jsonl, a plot for each optimizer and coordinates.md into --out.
The exit code is 1 if a muP check fails or a control passes. A shard, or a grid with one width, only
adds to --out and is not judged.
"""

import argparse
import shlex
import sys
from functools import partial
from operator import itemgetter
from pathlib import Path

import numpy as np

from data.files import write_atomic
from eval.command import command_parser
from eval.rollout.intervals import Estimate
from eval.tables import markdown
from studies.mup.coordinates import KINDS, STEPS, measure_coordinates
from studies.mup.figures import coordinates_figure
from studies.mup.grid import add_axes, commands, run_command
from studies.mup.slopes import slope, widths_of
from studies.report.style import save_png
from studies.stats.records import Record, grouped

SETTINGS = {  # of train.py
    **{"max_steps": STEPS[-1], "warmup_steps": 0, "schedule": "constant", "weight_decay": 0.0},
    **{"grad_clip": 0.0, "save_every": 1, "keep_checkpoints": STEPS[-1] + 1},
    **{"eval_batches": 1, "log_every": 1},
}
HIDDEN = ("qkv", "attention out", "fc", "mlp out", "residual")
FIRST = ("embedding", "qkv", "fc")  # judged at t = 0
MAX_FIRST, MAX_LOGITS = 0.05, 0.20
MAX_CHANGE = {"from 128": 0.10, "": 0.15}  # narrow models are farther from the limit
FIRST_CONTROL = ("qkv", "fc")  # judged at t = 0 under sp, where they grow as √width
ROOT_OF_WIDTH, TOLERANCE = 0.5, 0.1
MIN_CONTROL = 0.5  # least slope under sp: the largest hidden one at t = 1, the last of the logits
ONE_WIDTH = "open: one width has no slope"
Slopes = dict[tuple[str, int], Estimate]  # by kind and t


def slopes_of(records: list[Record]) -> Slopes:
    """Return the slopes of one optimizer and parametrisation by kind of activation and t."""

    def size(record: Record, kind: str, t: int) -> float | None:
        return record.get("coordinates", {}).get(kind, {}).get(str(t))

    keys = [(kind, t) for kind in (*KINDS, "logits") for t in STEPS]
    return {key: slope(records, partial(size, kind=key[0], t=key[1])) for key in keys}


def problems(slopes: Slopes, narrowest: int) -> list[str]:
    """Describe the slopes of muP that are too far from zero or missing."""
    change = MAX_CHANGE["from 128" if narrowest >= 128 else ""]
    bars = {(kind, 0): MAX_FIRST for kind in FIRST}
    bars |= {(kind, t): change for kind in HIDDEN for t in STEPS[1:]}
    bars["logits", STEPS[-1]] = MAX_LOGITS  # earlier, an untrained head has no direction
    return [
        f"{kind} t={t}: {slopes[kind, t].mean:+.2f}, wanted at most {bar:g}"
        for (kind, t), bar in bars.items()
        if not abs(slopes[kind, t].mean) <= bar
    ]


def missing(slopes: Slopes) -> list[str]:
    """Describe how sp should differ from muP and does not: the control must fail each check."""
    last = STEPS[-1]
    hidden = float(np.max([slopes[kind, 1].mean for kind in HIDDEN]))  # NaN if one is NaN
    found = [
        f"{kind} t=0: {slopes[kind, 0].mean:+.2f}, wanted {ROOT_OF_WIDTH:g} ± {TOLERANCE:g}"
        for kind in FIRST_CONTROL
        if not abs(slopes[kind, 0].mean - ROOT_OF_WIDTH) <= TOLERANCE
    ]
    measured = {f"hidden t=1: at most {hidden:+.2f}": hidden}
    measured[f"logits t={last}: {slopes['logits', last].mean:+.2f}"] = slopes["logits", last].mean
    found += [
        f"{text}, wanted {MIN_CONTROL:g}"
        for text, value in measured.items()
        if not value >= MIN_CONTROL
    ]
    return found


def verdict(parametrisation: str, slopes: Slopes, narrowest: int) -> tuple[bool, str]:
    """Return whether the slopes are as expected, and a description."""
    if parametrisation == "sp":
        found = missing(slopes)
        return not found, "PASSES: " + "; ".join(found) if found else "fails, as it should"
    found = problems(slopes, narrowest)
    return not found, "FAILS: " + "; ".join(found) if found else "passes"


def tables(records: list[Record]) -> tuple[bool, str]:
    """Return whether all slopes are as expected; and the verdicts and slopes in Markdown."""
    verdicts, rows, ratios = [], [], []
    is_good = True
    runs = grouped(records, itemgetter("variant", "parametrisation", "lr"))
    for (variant, kind, lr), own in runs.items():
        slopes, widths, name = slopes_of(own), widths_of(own), [variant, kind, f"{lr:.2g}"]
        good, text = verdict(kind, slopes, widths[0]) if len(widths) > 1 else (True, ONE_WIDTH)
        is_good &= good
        seeds = len({record["seed"] for record in own})
        verdicts.append([*name, f"{widths[0]} to {widths[-1]}", str(seeds), text])
        for t in STEPS:
            rows.append([*name, str(t), *(number(slopes[each, t]) for each in (*KINDS, "logits"))])
        for matrix in own[0].get("ap", {}):
            found = slope(own, lambda record, m=matrix: record.get("ap", {}).get(m))
            ratios.append([*name, matrix, number(found)])
    who = ["optimizer", "", "lr"]
    parts = [markdown([*who, "widths", "seeds", "verdict"], verdicts)]
    parts.append(markdown([*who, "t", *KINDS, "logits"], rows))
    parts += [markdown([*who, "matrix", "slope of ‖M‖/‖G‖"], ratios)] if ratios else []
    return is_good, "\n\n".join(parts)


def number(value: Estimate) -> str:
    half = (value.hi - value.lo) / 2
    return f"{value.mean:+.2f}" + (f" ± {half:.2f}" if half == half else "")


def write_report(out: Path, records: list[Record], command: str) -> tuple[bool, str]:
    """Write coordinates.md and the plots; return the result of `tables`."""
    is_good, text = tables(records)
    note = "Slopes of log2 RMS against log2 width; ± is half of the 95 % interval over seeds."
    head = f"# Coordinate check\n\n{commands(out, command)}\n\n{note}"
    write_atomic(out / "coordinates.md", f"{head}\n\n{text}\n")
    for (variant, lr), own in grouped(records, itemgetter("variant", "lr")).items():
        save_png(coordinates_figure(own), out / f"coordinates-{variant}-lr{lr:.2g}.png")
    return is_good, text


def parse(argv: list[str]) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    parser = command_parser("studies.mup.coord_check", __doc__)
    add_axes(parser, out=Path("out/coord_check"), octaves=[0])
    return parser, parser.parse_args(argv)


def main(argv: list[str]) -> int:
    parser, arguments = parse(argv)
    records = run_command(parser, arguments, SETTINGS, measure_coordinates)
    if records is None:
        return 0
    is_good, text = write_report(arguments.out, records, f"{parser.prog} {shlex.join(argv)}")
    print(text)
    print(f"{len(records)} runs, plots and coordinates.md in {arguments.out}")
    is_whole = arguments.shard[1] == 1 and len(arguments.widths) > 1
    return 1 if is_whole and not is_good else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
