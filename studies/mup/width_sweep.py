"""Sweep learning rate x width x seed x {SP, muP}: does the best rate transfer across widths?

    python -m studies.mup.width_sweep --optimizers dopr-adamw,dopr-muon --octaves=-3:4 --seeds 0,1,2

An octave is a factor of two on the optimizer's rate in studies/mup/trial.py. The command writes
records.jsonl, transfer.png (loss against rate), update_ratio.png and transfer.md into --out. The
tables contain the fitted optimum of each width, its shift in octaves, the regret of a rate that was
tuned at another width (the excess loss as a share of the lowest loss of the grid), and the size of
updates relative to the weights.
"""

import argparse
import shlex
import sys
from pathlib import Path

from data.files import write_atomic
from eval.command import command_parser
from studies.mup.figures import ratio_figure, transfer_figure
from studies.mup.grid import add_axes, commands, run_command
from studies.mup.tables import tables
from studies.mup.update_ratio import measure_update
from studies.report.style import save_png


def parse(argv: list[str]) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    parser = command_parser("studies.mup.width_sweep", __doc__)
    add_axes(parser, out=Path("out/width_sweep"), octaves=[*range(-3, 5)])
    parser.add_argument("--steps", type=int, default=200, help="optimizer steps of a run")
    return parser, parser.parse_args(argv)


def settings_of(steps: int) -> dict[str, int]:
    """Return the settings of train.py for a run length. The last two steps are saved."""
    lengths = {"max_steps": steps, "warmup_steps": steps // 10, "log_every": max(1, steps // 20)}
    return lengths | {"save_every": steps - 1, "keep_checkpoints": 2}


def main(argv: list[str]) -> None:
    parser, arguments = parse(argv)
    steps = arguments.steps
    if steps < 3:
        parser.error(f"--steps={steps}: must be at least 3")
    settings, more = settings_of(steps), [f"--steps={steps}"]
    records = run_command(parser, arguments, settings, measure_update, more)
    if records is None:
        return
    text = tables(records)
    done = commands(arguments.out, f"{parser.prog} {shlex.join(argv)}")
    write_atomic(arguments.out / "transfer.md", f"# Width sweep\n\n{done}\n\n{text}\n")
    save_png(transfer_figure(records), arguments.out / "transfer.png")
    save_png(ratio_figure(records), arguments.out / "update_ratio.png")
    print(text)
    print(f"{len(records)} runs, plots and transfer.md in {arguments.out}")


if __name__ == "__main__":
    main(sys.argv[1:])
