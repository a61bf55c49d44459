"""Print a table of the results of runs: `python -m eval.summary out/run1 out/run2 ...`"""

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import RootModel

from data.schema import OpenSchema, parse_json, read_json, read_json_lines
from eval.command import command_parser, reported_errors
from eval.tables import aligned
from optim.legacy_names import renamed_settings

COLUMNS = ("run", "optimizer", "steps", "val loss", "bits/byte", "tokens/s")


class RunSettings(OpenSchema):
    """The settings in a run's config.json that the table shows."""

    optimizer: str
    dopr: bool


class MetricsRow(OpenSchema):
    """A row of metrics.jsonl. The numbers that were not finite are null."""

    kind: str
    step: int
    loss: float | None = None
    ema_loss: float | None = None
    bits_per_byte: float | None = None
    tokens_per_s: float | None = None


def read_metrics(out_dir: Path, kind: str) -> list[MetricsRow]:
    """Read the rows of one kind in a run's metrics.jsonl. Raises ValueError naming a bad line.

    A last line without an end, which a kill has cut, is skipped.
    """
    rows = read_json_lines(out_dir / "metrics.jsonl", MetricsRow, ValueError, may_be_cut=True)
    return [row for _, row in rows if row.kind == kind]


def read_settings(out_dir: Path) -> RunSettings:
    """Read a run's config.json, in which settings may have names of an earlier release."""
    path = out_dir / "config.json"
    content = read_json(path, RootModel[dict[str, Any]], ValueError).root
    try:
        settings, _ = renamed_settings(content)
    except ValueError as error:  # a setting under its old and its new name
        raise ValueError(f"{path}: {error}") from None
    return parse_json(json.dumps(settings), str(path), RunSettings, ValueError)


def summarize(out_dir: Path) -> dict[str, Any]:
    """Summarize a run from its metrics.jsonl and config.json.

    The losses are those of the last validation; tokens/s is the median over the training.

    Raises:
        ValueError: the folder contains no run, a damaged one, or one without validation yet.
    """
    settings, val = read_settings(out_dir), read_metrics(out_dir, "val")
    if not val:
        raise ValueError(f"{out_dir} contains a run without any validation yet")
    speeds = [row.tokens_per_s or 0.0 for row in read_metrics(out_dir, "train")]
    return {
        "run": str(out_dir),
        "optimizer": ("dopr-" if settings.dopr else "") + settings.optimizer,
        "steps": val[-1].step,
        "val loss": val[-1].loss,
        "bits/byte": val[-1].bits_per_byte,
        "tokens/s": statistics.median(speeds) if speeds else 0.0,
    }


def table(summaries: list[dict[str, Any]]) -> str:
    """Format the summaries as text with aligned columns and one row per run."""
    rows: list[Sequence[str]] = [COLUMNS]
    for each in summaries:
        losses = (_number(each["val loss"]), _number(each["bits/byte"]))
        speed = f"{each['tokens/s']:,.0f}"
        rows.append((each["run"], each["optimizer"], str(each["steps"]), *losses, speed))
    return aligned(rows)


def _number(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.4f}"


def main(argv: list[str] | None = None) -> None:
    parser = command_parser("eval.summary", __doc__)
    parser.add_argument("out_dir", type=Path, nargs="+", help="a run's folder")
    arguments = parser.parse_args(argv)
    with reported_errors(parser):
        print(table([summarize(path) for path in arguments.out_dir]))


if __name__ == "__main__":
    main()
