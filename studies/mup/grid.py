"""The grid of a width study: its axes on the command line, its shards, its records.

Points lie in --out/runs, their records also in --out/records.jsonl. The same command continues
there; other optimizers, widths, rates and seeds are added to what is there. Shards (`--shard 1/8`)
and agents of a wandb sweep may work on one folder at a time. Where several end at once, the tables
may be of all but the last runs: the command without --shard makes them again.
"""

import argparse
import itertools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from eval.rollout.record import write_records
from eval.rollout.tasks import open_data
from studies.mup.trial import PARAMETRISATIONS, WidthTrial, run_width_trial
from studies.stats.analysis import Record
from studies.sweep.run_cache import TrialError, differences, finished, read_record
from studies.sweep.runner import Runner
from studies.sweep.variants import parse_changes, parse_variant
from trainer.checkpoint.read import write_atomic
from trainer.settings import FIELDS

AXES = ("optimizers", "parametrisations", "widths", "octaves", "seeds")
OF_A_POINT = {"mup", "n_embd", "lr", "seed"}  # what differs between the points of an optimizer
OF_THE_GRID = {
    *("optimizer", "dopr", "lr", "seed", "n_embd", "mup", "out_dir", "resume", "init_from"),
    *("max_steps", "save_every", "keep_checkpoints", "checkpoint_format"),
}


def add_axes(parser: argparse.ArgumentParser, **defaults: Any) -> None:
    """The arguments that both commands have; `defaults` of out and octaves."""
    add = parser.add_argument
    add(
        "--optimizers",
        type=words,
        required=True,
        help="comma-separated; see studies/sweep/variants.py",
    )
    add("--parametrisations", type=kinds, default=[*PARAMETRISATIONS], help="sp,mup")
    add("--widths", type=numbers, default=[32, 64, 128, 256], help="n_embd: 32,64 or so")
    add("--octaves", type=numbers, metavar="A:B or A,B,...", help="log2 of lr over RATES[optimizer]"
        " (studies/mup/trial.py), written --octaves=-3:4")  # fmt: skip
    add("--seeds", type=numbers, default=[0, 1, 2], help="of weights and data order")
    add("--set", nargs="*", default=[], metavar="KEY=VALUE", help="other settings of train.py")
    add("--workers", type=int, default=2, help="runs side by side, a thread each")
    add(
        "--shard", type=shard, default=(1, 1), metavar="I/N", help="every N-th point, from the I-th"
    )
    add("--out", type=Path, help="folder of all records, plots and tables")
    add("--wandb_sweep", type=Path, metavar="FILE", help="write a wandb sweep of this grid; no run")
    parser.set_defaults(**defaults)


def words(text: str) -> list[str]:
    return [*dict.fromkeys(text.split(","))]


def kinds(text: str) -> list[str]:
    found = words(text)
    if unknown := [kind for kind in found if kind not in PARAMETRISATIONS]:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r}: wants {' or '.join(PARAMETRISATIONS)}")
    return found


def numbers(text: str) -> list[int]:
    """`1,2,5`, or `-4:3` for all from -4 to 3; each once. ValueError if there is none."""
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
    """The points that the command line asks for, the narrow ones first.

    Where both parametrisations are wanted, one run at the base width stands for both.
    Raises ValueError, or ConfigError, if one of them could not be trained, or if a shard would be
    empty; PointError if there is a run of other settings.
    """
    variants = map(parse_variant, arguments.optimizers)
    settings = settings | parse_changes(arguments.set, OF_THE_GRID)
    axes = (arguments.widths, variants, arguments.parametrisations)
    points = [
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
    for point in points:
        asked_of[point.variant.name] = asked = point.asked()
        finished(point.folder, asked)
        if not (has_both and point.parametrisation == "sp" and is_base(asked)):
            kept.append(point)
    _check_alike(asked_of, arguments.out)
    part, parts = arguments.shard
    if part > len(kept):
        raise ValueError(f"--shard {part}/{parts}: is empty, the grid has {len(kept)} points")
    return kept[part - 1 :: parts]


def _check_alike(asked: dict[str, dict[str, Any]], out: Path) -> None:
    """PointError if --out has runs of these variants that differ in more than the axes."""
    for path in out.glob("runs/*/record.json"):
        record = read_record(path.parent)
        now = asked[record["variant"]] if record.get("variant") in asked else record["asked"]
        other = differences(record["asked"], now)
        if was := [f"{key} {change}" for key, change in other.items() if key not in OF_A_POINT]:
            raise TrialError(
                f"{path.parent} differs from what is asked: {'; '.join(was)}; choose another --out"
            )


def run_grid(points: Sequence[WidthTrial], out: Path, workers: int) -> list[Record]:
    """Run what is not finished; every record of the folder, also written to records.jsonl.

    Those of muP at the base width are returned as those of sp, too, if sp ran at other widths.
    Raises DataError before any run if there are no data.
    """
    for dataset in {point.asked()["dataset"] for point in points}:
        open_data(dataset)
    try:
        with Runner(str(out), workers, run_width_trial, _line, len(points)) as runner:
            runner.run(points)
    finally:
        records = [read_record(path.parent) for path in out.glob("runs/*/record.json")]
        records.sort(key=_key)
        out.mkdir(parents=True, exist_ok=True)
        write_records(out / "records.jsonl", records)
    return records + twins(records)


def commands(out: Path, command: str) -> str:
    """All commands that worked on a folder, this one among them, as a block of Markdown."""
    path = out / "commands.txt"
    there = path.read_text().splitlines() if path.exists() else []
    lines = [*dict.fromkeys([*there, command])]
    write_atomic(path, "\n".join(lines) + "\n")
    return "\n".join(["```sh", *lines, "```"])


def is_base(settings: dict[str, Any]) -> bool:
    """Whether muP with these settings is the standard parametrisation."""
    has_its_heads = settings["mup_base_head_dim"] in (
        None,
        settings["n_embd"] // settings["n_head"],
    )
    return settings["n_embd"] == settings["mup_base_width"] and has_its_heads


def twins(records: Sequence[Record]) -> list[Record]:
    """The records of muP at its base width as those of sp, which they are bit for bit.

    Of optimizers that sp ran with; without those that sp has itself.
    """
    there = {(r["variant"], r["width"], r["lr"], r["seed"]) for r in records if _is_sp(r)}
    with_sp = {variant for variant, *_ in there}
    return [
        record | {"parametrisation": "sp", "settings": record["settings"] | {"mup": False}}
        for record in records
        if not _is_sp(record) and is_base(record["settings"]) and record["variant"] in with_sp
        if (record["variant"], record["width"], record["lr"], record["seed"]) not in there
    ]


def _is_sp(record: Record) -> bool:
    return record["parametrisation"] == "sp"


def _key(record: Record) -> tuple[Any, ...]:
    keys = ("base", "variant", "parametrisation", "width", "lr", "seed")
    return tuple(record[key] for key in keys)


def _line(record: Record) -> str:
    has_loss = record["val_loss"] is not None
    loss = f"val loss {record['val_loss']:.4f}" if has_loss else "diverged"
    return (
        f"{record['variant']}  {record['parametrisation']}  width {record['width']}  "
        f"lr {record['lr']:g}  seed {record['seed']}  {loss}  {record['seconds']:.1f} s"
    )


def write_sweep(command: str, arguments: argparse.Namespace, more: Sequence[str]) -> int:
    """Write a wandb sweep whose agents run this grid, a point a run: the command, a value an axis.

        wandb sweep FILE; wandb agent ID

    more: arguments that are no axis. The file is JSON, which is YAML, too. Returns the exit code.
    """
    fixed = [f"--out={arguments.out}", "--workers=1", *more]
    fixed += ["--set", "wandb=online", *arguments.set]
    changes = parse_changes(arguments.set, OF_THE_GRID)
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
    return 0
