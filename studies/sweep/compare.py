"""Compare optimizers on one task: sweep learning rates, run fresh seeds, test paired differences.

    python -m studies.sweep.compare --task ctrl --optimizers adamw,dopr-adamw,muon,dopr-muon

The learning rate of each optimizer is swept on tuning seeds, by validation loss. Fresh seeds run at
the best rate, and only they are reported. A seed draws the weights, the order of the data and the
task's instance (automaton, graph, plant). All results are in --out. The same command continues
there, and other commands can add optimizers and seeds. The last line names the folder.
"""

import argparse
import shlex
import sys
from pathlib import Path

from eval.command import at_least, command_parser
from eval.rollout.tasks import parse_task
from studies.report.summary_text import below_leaderboard, on_matched
from studies.report.tables import leaderboard_text, matched_text
from studies.stats import consistency
from studies.stats.analysis import leaderboard, references
from studies.stats.matched import matched_validation, quantity
from studies.stats.records import Record
from studies.sweep.study import Study, compare
from studies.sweep.tasks import STUDY_TASKS, trial_type
from studies.sweep.variants import split


def summary(records: list[Record]) -> str:
    """Return the leaderboard and the comparison at equal validation loss.

    Raises AnalysisError if the records do not belong together.
    """
    consistency.check(records)
    rows, first = leaderboard(records), records[0]
    board = leaderboard_text(
        rows, references(records), first["primary"], higher_is_better=first["higher_is_better"]
    )
    matched = matched_text(matched_validation(records), quantity(first))
    parts = [board, *below_leaderboard(records), matched, on_matched(records)]
    return "\n\n".join(filter(None, parts))


def parse(argv: list[str]) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    parser = command_parser("studies.sweep.compare", __doc__)
    add = parser.add_argument
    add("--task", required=True, help=f"{', '.join(STUDY_TASKS)}; NAME,knob=value,...")
    add("--optimizers", required=True, help="comma-separated; see studies/sweep/variants.py")
    add("--seeds", type=int, default=5, help="number of fresh seeds, which are reported")
    add("--tuning_seeds", type=int, default=2, help="number of seeds of a learning-rate sweep")
    add("--steps", type=int, default=500, help="optimizer steps of a run")
    add("--tokens_per_step", type=int, default=1024, help="rounded to whole documents")
    add("--episodes", type=int, help="graded rollouts of each run; default: the task's, mostly 512")
    add("--set", nargs="*", default=[], metavar="KEY=VALUE", help="other settings of train.py")
    add("--workers", type=int, default=2, help="runs at a time, each in a process with one thread")
    add("--out", type=Path, help="folder of the results; default: out/compare/TASK-STEPS")
    return parser, parser.parse_args(argv)


def study_of(arguments: argparse.Namespace) -> Study:
    """Return the study that the command line describes.

    Raises ValueError or DataError, before any work, if it cannot be run.
    """
    counts = ("seeds", "tuning_seeds", "steps", "tokens_per_step", "episodes", "workers")
    at_least(1, **{key: getattr(arguments, key) for key in counts})
    task = parse_task(arguments.task, STUDY_TASKS)
    kind = trial_type(task)
    names = split(arguments.optimizers)
    if repeated := [name for name in dict.fromkeys(names) if names.count(name) > 1]:
        raise ValueError(f"--optimizers: {', '.join(repeated)} is given more than once")
    folder = task.spec if "," in arguments.task else task.name
    study = Study(
        out=arguments.out or Path("out/compare", f"{folder}-{arguments.steps}"),
        task=task,
        variants=tuple(map(kind.parse_variant, names)),
        steps=arguments.steps,
        tuning_seeds=arguments.tuning_seeds,
        fresh_seeds=arguments.seeds,
        n=arguments.episodes or task.default_episodes,
        settings=kind.sizes(task, arguments.steps, arguments.tokens_per_step)
        | kind.parse_changes(arguments.set),
    )
    study.check()
    return study


def notes(study: Study) -> str:
    """Return what a user should know before the study runs.

    There is a line for each optimizer without a grid and for each variant without its base.
    """
    kind = trial_type(study.task)
    optimizers = dict.fromkeys(variant.optimizer for variant in study.variants)
    lines = [
        f"{name}: has no grid of its own, so its sweep begins around its default, with "
        + ", ".join(f"{lr:g}" for lr in kind.first_rates(name))
        for name in optimizers
        if name not in kind.grids
    ]
    names = {variant.name for variant in study.variants}
    lines += [
        f"{each.name}: {each.base} is not in this command and will not run at its learning rate; "
        f"add it to --optimizers (finished runs are not repeated)"
        for each in study.variants
        if each.base not in names
    ]
    return "".join(f"{line}\n" for line in lines)


def main(argv: list[str]) -> None:
    parser, arguments = parse(argv)
    try:
        study = study_of(arguments)
        print(notes(study), end="")
        study.begin(f"{parser.prog} {shlex.join(argv)}")
        records = compare(study, arguments.workers)
        print(summary(records))
    except (ValueError, OSError) as error:
        parser.exit(2, f"error: {error}\n")
    except KeyboardInterrupt:
        parser.exit(
            130, f"stopped; finished runs are in {study.out}, the same command continues there\n"
        )
    print(f"{len(records)} runs in {study.out}; for a page: python -m studies.report {study.out}")
    for about, command in trial_type(study.task).further_commands.items():
        print(f"{about}: {command.format(out=study.out)}")


if __name__ == "__main__":
    main(sys.argv[1:])
