"""Print a table of the results of runs: `python -m eval.summary out/run1 out/run2 ...`"""

import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from eval.command import command_parser
from eval.tables import aligned

COLUMNS = ("run", "optimizer", "steps", "val loss", "bits/byte", "tokens/s")


class SummaryError(ValueError):
    """Raised for a folder without the records of a run."""


def summarize(out_dir: Path) -> dict[str, Any]:
    """Summarize a run from its metrics.jsonl and config.json.

    The losses are those of the last validation; tokens/s is the median over the training.

    Raises:
        SummaryError: the folder contains no run, or the run has no validation yet.
    """
    try:
        config = json.loads((out_dir / "config.json").read_text())
        rows = [json.loads(line) for line in (out_dir / "metrics.jsonl").read_text().splitlines()]
    except (OSError, ValueError) as error:
        raise SummaryError(f"{out_dir} contains no run ({error})") from error
    val = [row for row in rows if row["kind"] == "val"]
    if not val:
        raise SummaryError(f"{out_dir} contains a run without any validation yet")
    speeds = [row["tokens_per_s"] for row in rows if row["kind"] == "train"]
    return {
        "run": str(out_dir),
        "optimizer": ("dopr-" if config["dopr"] else "") + config["optimizer"],
        "steps": val[-1]["step"],
        "val loss": val[-1]["loss"],
        "bits/byte": val[-1]["bits_per_byte"],
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


def main(argv: list[str]) -> int:
    parser = command_parser("eval.summary", __doc__)
    parser.add_argument("out_dir", type=Path, nargs="+", help="a run's folder")
    try:
        print(table([summarize(path) for path in parser.parse_args(argv).out_dir]))
    except SummaryError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
