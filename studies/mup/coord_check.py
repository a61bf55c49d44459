"""The coordinate check of muP: does a step move activations as much at every width?

    python -m studies.mup.coord_check --optimizers adamw,dopr-adamw,muon --seeds 0,1,2

Trains each width a few steps, without warm-up, decay or clipping, and fits the slope of log2 RMS of
activations (t = 0), then of their change since t = 0, against log2 width. Under muP the slopes are
zero; the standard parametrisation (sp) is the control, and must fail. Writes records.jsonl, a plot
an optimizer and coordinates.md into --out. Exit code 1: a muP check failed, or a control passed;
a shard, or a grid of one width, only adds to --out and judges nothing.
"""

import argparse
import shlex
import sys
from functools import partial
from operator import itemgetter
from pathlib import Path

import numpy as np

from data.shards import DataError
from eval.command import command_parser
from eval.rollout.intervals import Estimate
from eval.tables import markdown
from studies.mup.coordinates import KINDS, STEPS, measure_coordinates
from studies.mup.figures import coordinates_figure
from studies.mup.grid import add_axes, commands, grid, run_grid, write_sweep
from studies.mup.slopes import slope, widths_of
from studies.report.style import save_png
from studies.stats.analysis import Record, grouped
from studies.sweep.run_cache import TrialError
from trainer.checkpoint.read import write_atomic

SETTINGS = {  # of train.py
    **{"max_steps": STEPS[-1], "warmup_steps": 0, "schedule": "constant", "weight_decay": 0.0},
    **{
        "grad_clip": 0.0,
        "save_every": 1,
        "keep_checkpoints": STEPS[-1] + 1,
        "eval_batches": 1,
        "log_every": 1,
    },
}
HIDDEN = ("qkv", "attention out", "fc", "mlp out", "residual")
FIRST = ("embedding", "qkv", "fc")  # at t = 0
MAX_FIRST, MAX_LOGITS = 0.05, 0.20
MAX_CHANGE = {"from 128": 0.10, "": 0.15}  # narrow models are further from the limit
FIRST_CONTROL = ("qkv", "fc")  # at t = 0, of sp: √d entries of a fixed size are summed
ROOT_OF_WIDTH, NEAR = 0.5, 0.1
MIN_CONTROL = 0.5  # of the largest hidden slope of sp at t = 1, and of its logits in the end
ONE_WIDTH = "open: one width has no slope"
Slopes = dict[tuple[str, int], Estimate]  # by kind and t


def slopes_of(records: list[Record]) -> Slopes:
    """Of one optimizer and parametrisation, for each kind of activation and each t."""

    def size(record: Record, kind: str, t: int) -> float | None:
        return record.get("coordinates", {}).get(kind, {}).get(str(t))

    keys = [(kind, t) for kind in (*KINDS, "logits") for t in STEPS]
    return {key: slope(records, partial(size, kind=key[0], t=key[1])) for key in keys}


def problems(slopes: Slopes, narrowest: int) -> list[str]:
    """The slopes of muP that are too far from zero, in words; a slope that is missing is, too."""
    change = MAX_CHANGE["from 128" if narrowest >= 128 else ""]
    bars = {(kind, 0): MAX_FIRST for kind in FIRST}
    bars |= {(kind, t): change for kind in HIDDEN for t in STEPS[1:]}
    bars["logits", STEPS[-1]] = MAX_LOGITS  # before, a head that knows nothing has no direction
    return [
        f"{kind} t={t}: {slopes[kind, t].mean:+.2f}, wanted at most {bar:g}"
        for (kind, t), bar in bars.items()
        if not abs(slopes[kind, t].mean) <= bar
    ]


def missing(slopes: Slopes) -> list[str]:
    """What tells a width rule from none and is not there in sp, in words: it has to fail each."""
    last = STEPS[-1]
    hidden = float(np.max([slopes[kind, 1].mean for kind in HIDDEN]))  # NaN if one is
    found = [
        f"{kind} t=0: {slopes[kind, 0].mean:+.2f}, wanted {ROOT_OF_WIDTH:g} ± {NEAR:g}"
        for kind in FIRST_CONTROL
        if not abs(slopes[kind, 0].mean - ROOT_OF_WIDTH) <= NEAR
    ]
    wanted = {f"hidden t=1: at most {hidden:+.2f}": hidden}
    wanted[f"logits t={last}: {slopes['logits', last].mean:+.2f}"] = slopes["logits", last].mean
    found += [
        f"{what}, wanted {MIN_CONTROL:g}" for what, is_ in wanted.items() if not is_ >= MIN_CONTROL
    ]
    return found


def verdict(parametrisation: str, slopes: Slopes, narrowest: int) -> tuple[bool, str]:
    """Whether it is as it should be, and in words."""
    if parametrisation == "sp":
        found = missing(slopes)
        return not found, "PASSES: " + "; ".join(found) if found else "fails, as it should"
    found = problems(slopes, narrowest)
    return not found, "FAILS: " + "; ".join(found) if found else "passes"


def tables(records: list[Record]) -> tuple[bool, str]:
    """Whether all is as it should be; verdicts and slopes in Markdown."""
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
    """coordinates.md and the plots; returns what `tables` does."""
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
    try:
        points = grid(arguments, SETTINGS, measure_coordinates)
        if arguments.wandb_sweep:
            return write_sweep("studies.mup.coord_check", arguments, [])
        records = run_grid(points, arguments.out, arguments.workers)
    except (DataError, TrialError, ValueError, OSError) as error:
        parser.exit(2, f"error: {error}\n")
    except KeyboardInterrupt:
        parser.exit(130, f"stopped; the same command goes on in {arguments.out}\n")
    command = shlex.join(["python", "-m", "studies.mup.coord_check", *argv])
    is_good, text = write_report(arguments.out, records, command)
    print(text)
    print(f"{len(records)} runs, plots and coordinates.md in {arguments.out}")
    is_whole = arguments.shard[1] == 1 and len(arguments.widths) > 1
    return 1 if is_whole and not is_good else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
