"""Compare the optimizers of a study again, each at its own best sampling temperature.

    python -m studies.sweep.temperature out/compare/pdfa-500

Sampling at another temperature corrects a model that is too sharp or too diffuse, so an optimizer
might win by its temperature alone. The metric that ranks chooses the temperature of each optimizer,
on the tuning runs at its learning rate. The fresh runs are then graded at that temperature, on the
same episodes as before. The base of each variant is also graded at the variant's rate and
temperature, because a choice from a few runs is noisy. Nothing is trained, but the models must be
in runs/ of the study's folder. Grades are not computed twice. The records go to temperature.jsonl
in that folder and the table to temperature.md.
"""

import shlex
import statistics
import sys
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from data.files import write_atomic
from data.shards import DataError
from eval.command import command_parser
from eval.rollout.policy import GPTPredictor, Predictor
from eval.rollout.record import readable, write_record, write_records
from eval.rollout.tasks import TASKS, task_of
from eval.rollout.ttf import grading_version, weights_of
from eval.run import run_of
from eval.tables import markdown
from studies.report.tables import compared, mean_and_half
from studies.stats.analysis import LeaderboardRow, leaderboard
from studies.stats.errors import log_error
from studies.stats.records import (
    AnalysisError,
    Record,
    by_variant,
    grouped,
    is_finished,
    load_records,
    read_object,
)
from studies.stats.temperatures import FILE, TemperatureRecord, TemperatureRow, conditions, ranked
from studies.sweep.results import without_curves
from studies.sweep.trial import run_folder
from trainer.checkpoint.read import CheckpointError, open_checkpoint

TEMPERATURES = (0.01, 0.25, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.2, 1.4)
COLUMNS = (
    *("optimizer", "T", "at 1", "at T", "error / base's at 1", "at T", "wins", "p"),
    "at T, base at this lr and T",
)


class TemperedPredictor(Predictor):
    """Sample another predictor at a temperature T: p^(1/T), renormalised."""

    def __init__(self, predictor: Predictor, temperature: float) -> None:
        self.predictor = predictor
        self.temperature = temperature

    def start(self, prompts: Tensor, length: int | None = None) -> Tensor:
        return self._temper(self.predictor.start(prompts, length))

    def read(self, tokens: Tensor) -> Tensor:
        return self._temper(self.predictor.read(tokens))

    def _temper(self, log_p: Tensor) -> Tensor:  # (B, V)
        return (log_p / self.temperature).log_softmax(-1)


def regrade(study: Path, record: Record, temperature: float) -> Record:
    """Return the record of the same model at a temperature, graded by the current code.

    The grade is read from disk if it was computed before. Raises CheckpointError if the model does
    not exist or is not the model of the record, and AnalysisError if the stored grade is damaged.
    """
    grading = (record.get("grading") or {}) | {"code": grading_version(task_of(record["spec"]))}
    is_unchanged = temperature == 1.0 and record.get("grading") == grading
    if is_unchanged or not is_finished(record):
        return record | {"temperature": temperature}
    folder = run_folder(study, record["variant"], record["lr"], record["seed"])
    path = folder / "temperature" / f"{temperature:g}.json"
    if path.exists() and (found := _read(path)).get("grading") == grading:
        return found | {"role": record["role"]}  # a control may have become a fresh run
    grade = _grade(folder, temperature, grading)
    write_record(path, record | {"grade": grade, "grading": grading, "temperature": temperature})
    return _read(path)


def _read(path: Path) -> Record:
    return read_object(path, TemperatureRecord, "delete it to grade the model again")


def _grade(folder: Path, temperature: float, grading: dict[str, Any]) -> dict[str, Any]:
    found = open_checkpoint(folder)
    if weights_of(found) != grading["checkpoint"]:
        raise CheckpointError(
            f"{found.path} is not the model of the study's record: it was trained again; run the "
            "study's command first, which grades it"
        )
    run = run_of(found)
    predictor = TemperedPredictor(GPTPredictor(run.model), temperature)
    task = task_of(run.config["dataset"])
    grade = task.grade(predictor, n=grading["n"], seed=grading["seed"])
    return readable(grade, run.tokenizer.decode)


def best_temperature(study: Path, records: list[Record]) -> float:
    """Return the temperature with the lowest mean log error over the runs of one optimizer.

    Returns 1 if a run diverged. Among equal errors the temperature nearest to 1 wins, so that a
    temperature without effect is not chosen.
    """
    if not all(map(is_finished, records)):
        return 1.0
    error = {
        t: statistics.mean(log_error(regrade(study, record, t)) for record in records)
        for t in sorted(TEMPERATURES, key=lambda t: abs(t - 1))
    }
    return min(error, key=error.__getitem__)


def at_best_temperatures(study: Path, records: list[Record]) -> list[Record]:
    """Return the fresh records of a study, each at the best temperature of its optimizer."""
    fresh = by_variant(record for record in records if record["role"] == "fresh")
    found = []
    for name, own in tqdm(fresh.items(), unit="optimizer", disable=not sys.stderr.isatty()):
        tuning = [r for r in records if r["role"] == "tuning" and r["variant"] == name]
        temperature = best_temperature(study, [r for r in tuning if r["lr"] == own[0]["lr"]])
        found += [regrade(study, record, temperature) for record in own]
    return found


def controls(study: Path, records: list[Record], after: list[Record]) -> list[Record]:
    """Return the bases on the fresh seeds at the rate and temperature of each of their variants."""
    pairs = {conditions(record) for record in after if record["variant"] != record["base"]}
    graded = (record for record in records if record["role"] in ("fresh", "control"))
    at_rate = grouped(graded, itemgetter("variant", "lr"))
    return [
        regrade(study, record, temperature) | {"role": "control"}
        for name, lr, temperature in sorted(pairs)
        for record in at_rate.get((name, lr), [])
    ]


def table(before: list[Record], after: list[Record]) -> str:
    """Return a Markdown table with a row for each optimizer, the best at its temperature first."""
    at_one = {row.variant: row for row in leaderboard(before)}
    return markdown(COLUMNS, [_cells(at_one[each.row.variant], each) for each in ranked(after)])


def _cells(before: LeaderboardRow, after: TemperatureRow) -> tuple[str, ...]:
    row, equal = after.row, after.all_else_equal
    values = mean_and_half(before.primary), mean_and_half(row.primary)
    ratios = ("", "", "", "")
    if before.versus_base and row.versus_base:
        ratios = (compared(before.versus_base)[0], *compared(row.versus_base))
    at_equal = compared(equal)[0] if equal else ""
    return (row.variant, f"{after.temperature:g}", *values, *ratios, at_equal)


def _records(study: Path) -> list[Record]:
    """Return the records of a study's transformers. Raises AnalysisError if there are none."""
    records = [record for record in load_records([study]) if record["role"] != "reference"]
    has_fresh = any(record["role"] == "fresh" for record in records)
    if not has_fresh or records[0]["task"] not in TASKS:
        raise AnalysisError(
            f"{study}: not a study of sampled rollouts; make one with "
            "`python -m studies.sweep.compare`"
        )
    return records


def main(argv: list[str] | None = None) -> None:
    parser = command_parser("studies.sweep.temperature", __doc__)
    parser.add_argument("study", type=Path, help="a folder of studies.sweep.compare with its runs/")
    study = parser.parse_args(argv).study
    torch.set_num_threads(1)
    try:
        records = _records(study)
        after = at_best_temperatures(study, records)
        after += controls(study, records, after)
    except (CheckpointError, DataError, OSError, ValueError) as error:
        parser.exit(2, f"error: {error}\n")
    before = [record for record in records if record["role"] == "fresh"]
    text = table(before, after)
    command = f"`{parser.prog} {shlex.quote(str(study))}`"
    write_records(study / FILE, map(without_curves, after))
    write_atomic(study / "temperature.md", f"{command}\n\n{text}\n")
    print(text)
    print(f"{len(before)} runs at their optimizer's temperature: {study / FILE}")


if __name__ == "__main__":
    main()
