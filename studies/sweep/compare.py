"""Compare optimizers on one task: sweep, fresh seeds, paired tests, rollouts against validation.

    python -m studies.sweep.compare --task ctrl --optimizers adamw,dopr-adamw,muon,dopr-muon --seeds 5

The learning rate of each optimizer is swept on tuning seeds, by validation loss; fresh seeds run at
the best rate, and they alone are reported. A seed draws the weights, the order of the data and the
task's instance (automaton, graph, plant). Everything is in --out; the same command continues there,
and more optimizers or seeds are added to it. The last line says where the records are.
"""

import argparse
import shlex
import sys
from pathlib import Path
from typing import Any

from data.shards import DataError
from eval.command import command_parser
from eval.rollout.tasks import TASKS, Task, parse_task
from eval.rollout.tasks.lds import Lds
from studies.report.summary_text import below_leaderboard, on_matched
from studies.report.tables import leaderboard_text, matched_text
from studies.stats import consistency
from studies.stats.analysis import Record, leaderboard, references
from studies.stats.matched import matched_validation, quantity
from studies.sweep.lds import parse_lds_variant
from studies.sweep.run_cache import TrialError
from studies.sweep.study import DEFAULT_GRID, GRIDS, Study, compare
from studies.sweep.variants import OF_THE_STUDY, Variant, parse_changes, parse_variant


def summary(records: list[Record]) -> str:
    """The leaderboard, and what validation loss does not explain. AnalysisError: stale records."""
    consistency.check(records)
    rows, first = leaderboard(records), records[0]
    higher = first["higher_is_better"]
    extra = references(records)
    board = leaderboard_text(rows, extra, first["primary"], higher_is_better=higher)
    matched = matched_text(matched_validation(records), quantity(first))
    parts = [board, *below_leaderboard(records), matched, on_matched(records)]
    return "\n\n".join(filter(None, parts))


def parse(argv: list[str]) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    parser = command_parser("studies.sweep.compare", __doc__)
    add = parser.add_argument
    add("--task", required=True, help=f"{', '.join([*TASKS, Lds.name])}; NAME,knob=value,...")
    add("--optimizers", required=True, help="comma-separated; see studies/sweep/variants.py")
    add("--seeds", type=int, default=5, help="fresh seeds, the ones reported")
    add("--tuning_seeds", type=int, default=2, help="seeds of a learning-rate sweep")
    add("--steps", type=int, default=500, help="optimizer steps of a run")
    add("--tokens_per_step", type=int, default=1024, help="rounded to whole documents")
    add("--episodes", type=int, default=512, help="graded rollouts a run")
    add("--set", nargs="*", default=[], metavar="KEY=VALUE", help="other settings of train.py")
    add("--workers", type=int, default=2, help="runs side by side, a thread each")
    add("--out", type=Path, help="default: out/compare/TASK-STEPS")
    return parser, parser.parse_args(argv)


def study_of(arguments: argparse.Namespace) -> Study:
    """The study that the command line describes. ValueError or DataError before any work."""
    for key in ("seeds", "tuning_seeds", "steps", "tokens_per_step", "episodes", "workers"):
        if getattr(arguments, key) < 1:
            raise ValueError(f"--{key}={getattr(arguments, key)}: must be at least 1")
    task = parse_task(arguments.task, TASKS | {Lds.name: Lds})
    settings = training(task, arguments.steps, arguments.tokens_per_step)
    name = task.spec if "," in arguments.task else task.name
    study = Study(
        out=arguments.out or Path("out/compare", f"{name}-{arguments.steps}"),
        task=task,
        variants=variants_of(task, arguments.optimizers.split(",")),
        steps=arguments.steps,
        tuning_seeds=arguments.tuning_seeds,
        fresh_seeds=arguments.seeds,
        n=arguments.episodes,
        settings=settings | changes_of(task, arguments.set),
    )
    study.check()
    return study


def notes(study: Study) -> str:
    """What is to be known before a study runs: optimizers without a grid, variants without base."""
    rates = ", ".join(f"{lr:g}" for lr in DEFAULT_GRID)
    names = dict.fromkeys(variant.optimizer for variant in study.variants)
    lines = [
        f"{name}: no row in GRIDS of studies/sweep/study.py, so its sweeps begin with {rates}"
        for name in names
        if name not in GRIDS
    ]
    there = {variant.name for variant in study.variants}
    lines += [
        f"{each.name}: {each.base} is not in this command, and will not run at its learning rate; "
        f"name it too (what is finished is not run again)"
        for each in study.variants
        if each.base not in there
    ]
    return "".join(f"{line}\n" for line in lines)


def variants_of(task: Task | Lds, names: list[str]) -> tuple[Variant, ...]:
    """The variants of these names. ValueError if one is none, or is there twice."""
    if twice := [name for name in dict.fromkeys(names) if names.count(name) > 1]:
        raise ValueError(f"--optimizers: {', '.join(twice)} is there more than once")
    return tuple(map(parse_lds_variant if isinstance(task, Lds) else parse_variant, names))


def changes_of(task: Task | Lds, pairs: list[str]) -> dict[str, str]:
    """The settings of --set. ValueError if one is unknown, fixed here, or none of `lds`."""
    if pairs and isinstance(task, Lds):
        raise ValueError("--set: task lds has no such settings; see `optimizer+gamma=0.1`")
    return parse_changes(pairs, OF_THE_STUDY | {"block_size"})  # that of an episode


def training(task: Task | Lds, steps: int, tokens_per_step: int) -> dict[str, Any]:
    """Settings of train.py that follow from the task's size, beside those of config/ttf.py."""
    if isinstance(task, Lds):
        return {}
    documents = max(1, round(tokens_per_step / task.context_tokens))
    sizes = {"block_size": task.context_tokens, "batch_size": documents}
    sizes["micro_batch_size"] = documents
    return sizes | {"warmup_steps": steps // 10, "eval_every": steps}


def main(argv: list[str]) -> None:
    parser, arguments = parse(argv)
    try:
        study = study_of(arguments)
        print(notes(study), end="")
        study.begin(shlex.join(["python", "-m", "studies.sweep.compare", *argv]))
        records = compare(study, arguments.workers)
        print(summary(records))
    except (DataError, TrialError, ValueError, OSError) as error:
        parser.exit(2, f"error: {error}\n")
    except KeyboardInterrupt:
        parser.exit(130, f"stopped; what is finished is in {study.out}, the same command goes on\n")
    print(f"{len(records)} runs in {study.out}; a page: python -m studies.report {study.out}")


if __name__ == "__main__":
    main(sys.argv[1:])
