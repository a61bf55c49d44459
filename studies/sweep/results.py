"""Add the records of finished runs to the file of a study."""

from collections.abc import Collection, Iterable
from pathlib import Path

from eval.rollout.record import write_records
from studies.stats.records import Record, read_records


def unite(path: Path, records: Collection[Record]) -> list[Record]:
    """Add records to a file as `united` does, and return everything that it then contains."""
    rows = united(read_records(path), records)
    write_records(path, rows)
    return rows


def united(found: Iterable[Record], records: Collection[Record]) -> list[Record]:
    """Return the records that were found and new ones, in order.

    A record replaces that of the same run. Fresh runs replace all fresh runs of the same variant at
    another rate, because a sweep has one best rate.
    """
    rates = {row["variant"]: row["lr"] for row in records if row["role"] == "fresh"}
    rows = [
        row
        for row in found
        if row["role"] != "fresh" or row["lr"] == rates.get(row["variant"], row["lr"])
    ]
    rows += [
        without_curves(record) if record["role"] in ("tuning", "control") else record
        for record in records
    ]
    by_run = {(row["variant"], row["lr"], row["seed"]): row for row in rows}
    return [by_run[key] for key in sorted(by_run)]


def without_curves(record: Record) -> Record:
    """Return a record without its curves and samples, which remain in the folder of its run."""
    if record["grade"] is None:
        return record
    return record | {"grade": record["grade"] | {"curves": {}, "n_t": {}, "samples": []}}
