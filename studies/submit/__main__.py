"""Check a study for the board, repeat it in part, and add its rows.

    python -m studies.submit out/board/pdfa [--check] [--board FOLDER]

Checks the folder against the rules of docs/leaderboard.md, repeats one of its runs bit for bit, and
runs its optimizers on hidden seeds, which follow from the hash of the revision. Then adds the
records to those of the task in --board, the hidden ones in a file of their own; all records of
these optimizers that the board has from before are removed. Nothing changes unless all of this
succeeds. The same command continues where it was stopped.
"""

import shlex
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import torch

from eval.command import command_parser, positive_int
from eval.rollout.record import write_records
from studies.report.tables import leaderboard_text
from studies.stats import consistency
from studies.stats.analysis import leaderboard
from studies.stats.records import RECORDS, Record, read_records
from studies.submit.repeat import HIDDEN, chosen_run, hidden_trials, repeat
from studies.submit.rules import rule_problems, submitted_study
from studies.sweep.results import united
from studies.sweep.runner import Runner
from studies.sweep.study import run_line
from studies.sweep.trial import run_trial
from trainer.provenance import provenance


def table(records: list[Record]) -> str:
    first = records[0]
    higher = first["higher_is_better"]
    return leaderboard_text(leaderboard(records), {}, first["primary"], higher_is_better=higher)


def merged(path: Path, names: set[str], records: list[Record]) -> list[Record]:
    """Return the records of a file of the board in which those of the variants `names` are new.

    Raises ValueError if others cannot be compared with them, or have a base in `names`, which is
    replaced.
    """
    others = [record for record in read_records(path) if record["variant"] not in names]
    if orphans := sorted({each["variant"] for each in others if each["base"] in names}):
        raise ValueError(
            f"the board compares {', '.join(orphans)} with a base of this study, whose runs would "
            "be replaced by those of another revision: submit them together"
        )
    rows = united(others, records)
    consistency.check(rows)
    return rows


def submit(
    folder: Path, board: Path, out: Path, *, only_check: bool, workers: int, command: str
) -> None:
    """Check a folder and add its rows.

    Raises:
        ValueError: the folder breaks the rules, and the message lists all problems, or its records
            cannot replace those of the board.
        TrialError: a run failed, or could not be repeated.
    """
    study, records = submitted_study(folder)
    revision = provenance(torch.device("cpu"))["git"]
    if problems := rule_problems(study, records, revision):
        listed = "\n  ".join(problems)
        raise ValueError(f"{folder} breaks {len(problems)} rule(s):\n  {listed}")
    names, place = {variant.name for variant in study.variants}, board / study.task.name
    for name, known in {RECORDS: records, HIDDEN: []}.items():
        merged(place / name, names, known)  # raises an error before any run
    print(f"{folder}: {len(records)} runs keep the rules")
    if only_check:
        return
    run = chosen_run(records, revision)
    with tempfile.TemporaryDirectory() as scratch:
        torch.set_num_threads(1)
        repeat(study, run, Path(scratch, "run"))
    print(f"{run['variant']}, seed {run['seed']}, was repeated bit for bit")
    trials = hidden_trials(study, records, revision, out / f"{study.task.name}-{revision}")
    with Runner("hidden seeds", workers, run_trial, run_line, len(trials)) as runner:
        hidden = runner.run(trials)
    files = {HIDDEN: hidden, RECORDS: records}
    rows = {name: merged(place / name, names, new) for name, new in files.items()}
    place.mkdir(parents=True, exist_ok=True)
    replace(study, out=place).begin(command)
    for name in files:
        write_records(place / name, rows[name])
    print(f"published seeds\n{table(records)}\n\nhidden seeds\n{table(hidden)}\n\nadded to {place}")


def main(argv: list[str]) -> None:
    parser = command_parser("studies.submit", __doc__)
    add = parser.add_argument
    add("folder", type=Path, help="of studies.sweep.compare, with protocol.json and records.jsonl")
    add("--check", action="store_true", help="check the rules only; run and add nothing")
    add("--board", type=Path, default=Path("studies/results/board"))
    add("--out", type=Path, default=Path("out/submit"), help="folder of the hidden runs")
    add("--workers", type=positive_int, default=2, help="runs at a time")
    arguments = parser.parse_args(argv)
    try:
        submit(
            arguments.folder,
            arguments.board,
            arguments.out,
            only_check=arguments.check,
            workers=arguments.workers,
            command=f"{parser.prog} {shlex.join(argv)}",
        )
    except (ValueError, OSError) as error:
        parser.exit(2, f"error: {error}\n")
    except KeyboardInterrupt:
        parser.exit(130, "stopped; nothing was added, the same command continues\n")


if __name__ == "__main__":
    main(sys.argv[1:])
