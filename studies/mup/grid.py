"""Run the grid of a width study: its axes on the command line, its shards, its records.

Runs are in --out/runs, and their records also in --out/records.jsonl. The same command continues
there, and other commands can add optimizers, widths, rates and seeds. Shards (`--shard 1/8`) and
agents of a wandb sweep may work on one folder at the same time. If several end at once, the tables
may lack the last runs: run the command without --shard to make them again.
"""

import argparse
import itertools
import json
from collections.abc import Callable, Sequence
from operator import itemgetter
from pathlib import Path
from typing import Any

from data.files import write_atomic
from eval.command import positive_int
from eval.rollout.record import write_records
from eval.rollout.tasks import open_data
from studies.mup.trial import PARAMETRISATIONS, WidthTrial, run_width_trial
from studies.stats.records import RECORDS, Record
from studies.sweep.run_cache import TrialError, differences, finished, read_record
from studies.sweep.runner import Runner
from studies.sweep.variants import parse_changes, parse_variant
from trainer.settings import FIELDS

AXES = ("optimizers", "parametrisations", "widths", "octaves", "seeds")
AXIS_SETTINGS = {"mup", "n_embd", "lr", "seed"}  # differ between the runs of an optimizer
GRID_SETTINGS = {  # the grid itself sets these
    *("optimizer", "dopr", "lr", "seed", "n_embd", "mup", "out_dir", "resume", "init_from"),
    *("max_steps", "save_every", "keep_checkpoints", "checkpoint_format"),
}


def add_axes(parser: argparse.ArgumentParser, **defaults: Any) -> None:
    """Add the arguments of both width studies; `defaults` gives --out and --octaves."""
    add = parser.add_argument
    names = "comma-separated; see studies/sweep/variants.py"
    add("--optimizers", type=words, required=True, help=names)
    add("--parametrisations", type=kinds, default=[*PARAMETRISATIONS], help="sp,mup")
    add("--widths", type=numbers, default=[32, 64, 128, 256], help="values of n_embd: 32,64")
    add("--octaves", type=numbers, metavar="A:B or A,B,...", help="log2 of lr over RATES[optimizer]"
        " (studies/mup/trial.py), written --octaves=-3:4")  # fmt: skip
    add("--seeds", type=numbers, default=[0, 1, 2], help="seeds of weights and data order")
    add("--set", nargs="*", default=[], metavar="KEY=VALUE", help="other settings of train.py")
    about = "runs at a time, each in a process with one thread"
    add("--workers", type=positive_int, default=2, help=about)
    add("--shard", type=shard, default=(1, 1), metavar="I/N", help="every N-th run, from the I-th")
    add("--out", type=Path, help="folder of the records, plots and tables")
    about = "write a wandb sweep of this grid and run nothing"
    add("--wandb_sweep", type=Path, metavar="FILE", help=about)
    parser.set_defaults(**defaults)


def words(text: str) -> list[str]:
    return [*dict.fromkeys(text.split(","))]


def kinds(text: str) -> list[str]:
    found = words(text)
    if unknown := [kind for kind in found if kind not in PARAMETRISATIONS]:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r}: must be {' or '.join(PARAMETRISATIONS)}")
    return found


def numbers(text: str) -> list[int]:
    """Parse `1,2,5`, or `-4:3` for -4 to 3, without repetitions. Raises ValueError if malformed."""
    if ":" not in text:
        return [*dict.fromkeys(map(int, text.split(",")))]
    first, last = map(int, text.split(":"))
    if first > last:
        raise ValueError
    return [*range(first, last + 1)]


def shard(text: str) -> tuple[int, int]:
    part, parts = map(int, text.split("/"))
    if not 1 <= part <= parts:
        raise ValueError
    return part, parts


def grid(
    arguments: argparse.Namespace,
    settings: dict[str, Any],
    measure: Callable[[Path], dict[str, Any]],
) -> list[WidthTrial]:
    """Return the runs that the command line describes, narrow ones first.

    At the base width both parametrisations are the same run, which is included once.

    Raises:
        ValueError, ConfigError: a run cannot be trained, or the shard is empty.
        TrialError: the folder contains a run with other settings.
    """
    variants = map(parse_variant, arguments.optimizers)
    settings = settings | parse_changes(arguments.set, GRID_SETTINGS)
    axes = (arguments.widths, variants, arguments.parametrisations)
    trials = [
        WidthTrial(
            folder=arguments.out / "runs" / f"{variant.name}-{kind}-{width}-{octave:g}-{seed}",
            variant=variant,
            parametrisation=kind,
            width=width,
            octave=octave,
            seed=seed,
            settings=settings,
            measure=measure,
        )
        for width, variant, kind, octave, seed in itertools.product(
            *axes, arguments.octaves, arguments.seeds
        )
    ]
    has_both = {*PARAMETRISATIONS} <= {*arguments.parametrisations}
    kept, asked_of = [], {}
    for trial in trials:
        asked_of[trial.variant.name] = asked = trial.asked()
        finished(trial.folder, asked)  # raises TrialError if the folder has another run
        if not (has_both and trial.parametrisation == "sp" and is_base(asked)):
            kept.append(trial)
    _check_equal_settings(asked_of, arguments.out)
    part, parts = arguments.shard
    if part > len(kept):
        raise ValueError(f"--shard {part}/{parts}: is empty, the grid has {len(kept)} runs")
    return kept[part - 1 :: parts]


def _check_equal_settings(asked: dict[str, dict[str, Any]], out: Path) -> None:
    """Raise TrialError if --out has runs of these variants that differ in more than the axes."""
    for path in out.glob("runs/*/record.json"):
        record = read_record(path.parent)
        now = asked[record["variant"]] if record.get("variant") in asked else record["asked"]
        changes = differences(record["asked"], now)
        if was := [f"{key} {text}" for key, text in changes.items() if key not in AXIS_SETTINGS]:
            raise TrialError(
                f"{path.parent} has other settings than this command: {'; '.join(was)}; choose "
                "another --out"
            )


def run_command(
    parser: argparse.ArgumentParser,
    arguments: argparse.Namespace,
    settings: dict[str, Any],
    measure: Callable[[Path], dict[str, Any]],
    more: Sequence[str] = (),
) -> list[Record] | None:
    """Run the grid of a command line; return its records, or None if it writes a wandb sweep.

    more: arguments of the command that are not axes.

    Raises:
        SystemExit: a run cannot be trained (2), or the user stops the command (130).
    """
    try:
        if arguments.wandb_sweep and not any(x.startswith("wandb=") for x in arguments.set):
            arguments.set = ["wandb=online", *arguments.set]
        trials = grid(arguments, settings, measure)
        if arguments.wandb_sweep:
            write_sweep(parser.prog.split()[-1], arguments, more)
            return None
        return run_grid(trials, arguments.out, arguments.workers)
    except (ValueError, OSError) as error:
        parser.exit(2, f"error: {error}\n")
    except KeyboardInterrupt:
        parser.exit(130, f"stopped; the same command continues in {arguments.out}\n")


def run_grid(trials: Sequence[WidthTrial], out: Path, workers: int) -> list[Record]:
    """Run the trials that have not finished; write records.jsonl and return all its records.

    Records of muP at the base width are also returned as records of sp if sp ran at other widths.
    Raises DataError, before any run, if the data do not exist.
    """
    for dataset in {trial.asked()["dataset"] for trial in trials}:
        open_data(dataset)
    try:
        with Runner(str(out), workers, run_width_trial, _line, len(trials)) as runner:
            runner.run(trials)
    finally:
        records = [read_record(path.parent) for path in out.glob("runs/*/record.json")]
        records.sort(key=itemgetter("base", "variant", "parametrisation", "width", "lr", "seed"))
        out.mkdir(parents=True, exist_ok=True)
        write_records(out / RECORDS, records)
    return records + twins(records)


def commands(out: Path, command: str) -> str:
    """Add a command to those that worked on a folder; return all as a block of Markdown."""
    path = out / "commands.txt"
    earlier = path.read_text().splitlines() if path.exists() else []
    lines = [*dict.fromkeys([*earlier, command])]
    write_atomic(path, "\n".join(lines) + "\n")
    return "\n".join(["```sh", *lines, "```"])


def is_base(settings: dict[str, Any]) -> bool:
    """Whether muP with these settings equals the standard parametrisation."""
    head_dim = settings["n_embd"] // settings["n_head"]
    has_base_heads = settings["mup_base_head_dim"] in (None, head_dim)
    return settings["n_embd"] == settings["mup_base_width"] and has_base_heads


def twins(records: Sequence[Record]) -> list[Record]:
    """Return the records of muP at its base width as records of sp, to which they are identical.

    Only optimizers that ran under sp are included, and only runs that sp does not have.
    """
    run_of = itemgetter("variant", "width", "lr", "seed")
    existing = {run_of(each) for each in records if each["parametrisation"] == "sp"}
    with_sp = {variant for variant, *_ in existing}
    return [
        record | {"parametrisation": "sp", "settings": record["settings"] | {"mup": False}}
        for record in records
        if record["parametrisation"] == "mup" and is_base(record["settings"])
        if record["variant"] in with_sp and run_of(record) not in existing
    ]


def _line(record: Record) -> str:
    loss = "diverged" if record["val_loss"] is None else f"val loss {record['val_loss']:.4f}"
    return (
        f"{record['variant']}  {record['parametrisation']}  width {record['width']}  "
        f"lr {record['lr']:g}  seed {record['seed']}  {loss}  {record['seconds']:.1f} s"
    )


def write_sweep(command: str, arguments: argparse.Namespace, more: Sequence[str]) -> None:
    """Write a wandb sweep whose agents run this grid.

        wandb sweep FILE; wandb agent ID

    An agent calls the command with one value for each axis. The file is JSON, which is also YAML.
    """
    fixed = [f"--out={arguments.out}", "--workers=1", *more]
    fixed += ["--set", *arguments.set]
    changes = parse_changes(arguments.set, GRID_SETTINGS)
    content = {
        "program": command,
        "project": changes.get("wandb_project", FIELDS["wandb_project"].default),
        "method": "grid",
        "metric": {"name": "val/loss", "goal": "minimize"},
        "parameters": {axis: {"values": getattr(arguments, axis)} for axis in AXES},
        "command": ["${env}", "python", "-m", command, "${args}", *fixed],
    }
    write_atomic(arguments.wandb_sweep, json.dumps(content, indent=2) + "\n")
    print(f"wandb sweep {arguments.wandb_sweep}")
