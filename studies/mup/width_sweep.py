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
from data.shards import DataError
from eval.command import command_parser
from studies.mup.figures import ratio_figure, transfer_figure
from studies.mup.grid import add_axes, commands, grid, run_grid, write_sweep
from studies.mup.tables import tables
from studies.mup.update_ratio import measure_update
from studies.report.style import save_png
from studies.sweep.run_cache import TrialError


def parse(argv: list[str]) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    parser = command_parser("studies.mup.width_sweep", __doc__)
    add_axes(parser, out=Path("out/width_sweep"), octaves=[*range(-3, 5)])
    parser.add_argument("--steps", type=int, default=200, help="optimizer steps of a run")
    return parser, parser.parse_args(argv)


def settings_of(steps: int) -> dict[str, int]:
    """Return the settings of train.py for a run length. The last two steps are saved."""
    if steps < 3:
        raise ValueError(f"--steps={steps}: must be at least 3")
    every = max(1, steps // 20)
    return {"max_steps": steps, "warmup_steps": steps // 10, "log_every": every} | {
        "save_every": steps - 1,
        "keep_checkpoints": 2,
    }


def main(argv: list[str]) -> None:
    parser, arguments = parse(argv)
    try:
        trials = grid(arguments, settings_of(arguments.steps), measure_update)
        if arguments.wandb_sweep:
            write_sweep("studies.mup.width_sweep", arguments, [f"--steps={arguments.steps}"])
            return
        records = run_grid(trials, arguments.out, arguments.workers)
    except (DataError, TrialError, ValueError, OSError) as error:
        parser.exit(2, f"error: {error}\n")
    except KeyboardInterrupt:
        parser.exit(130, f"stopped; the same command continues in {arguments.out}\n")
    text = tables(records)
    done = commands(arguments.out, shlex.join(["python", "-m", "studies.mup.width_sweep", *argv]))
    write_atomic(arguments.out / "transfer.md", f"# Width sweep\n\n{done}\n\n{text}\n")
    save_png(transfer_figure(records), arguments.out / "transfer.png")
    save_png(ratio_figure(records), arguments.out / "update_ratio.png")
    print(text)
    print(f"{len(records)} runs, plots and transfer.md in {arguments.out}")


if __name__ == "__main__":
    main(sys.argv[1:])
