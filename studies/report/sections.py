"""Divide the records of a report into sections, one for each task and training length.

A section contains either the runs of studies or single runs, never both: the former have intervals
over seeds, the latter over the episodes of one run.
"""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from studies.report.leaderboard import Entry, entries
from studies.stats.consistency import knobs_of
from studies.stats.records import Record, grouped, is_finished, is_reported

ALPHA = 0.05  # the largest probability of any false star in a family


@dataclass(frozen=True)
class Family:
    """Comparisons that are judged together; a star marks p below ALPHA / n (Bonferroni)."""

    n: int
    source: str  # description of the comparisons

    @property
    def threshold(self) -> float:
        return ALPHA / self.n


def family_of(n_here: int, n_planned: int) -> Family:
    """Return the family of the planned comparisons, or of those on the page if they are more.

    n_planned: 0 if it is unknown.
    """
    if n_planned >= max(1, n_here):
        return Family(n_planned, f"all that were planned, {n_here} of them on this page")
    more = f"; only {n_planned} were planned" if n_planned else ""
    return Family(max(1, n_here), f"those in the studies of this page{more}")


@dataclass(frozen=True)
class Section:
    """The records of one task and training length with their leaderboard."""

    task: str
    steps: int
    knobs: str  # the task's specification without its instance
    apart: str  # the knobs in which sections of this task differ
    is_study: bool
    records: list[Record]  # of optimizers
    references: list[Record]  # of reference policies: the oracle, the uniform model
    metric: str
    higher_is_better: bool
    entries: list[Entry]
    family: Family

    @property
    def n_comparisons(self) -> int:
        return sum(entry.variant != entry.base for entry in self.entries)

    @property
    def name(self) -> str:
        """The task with the knobs that tell it from other sections: "lds, excitation=1"."""
        return ", ".join(filter(None, [self.task, self.apart]))

    @property
    def error_on_data(self) -> str:
        """The name of the error on the data's contexts that rollouts are compared with."""
        graded = [record["grade"]["metrics"] for record in self.records if record["grade"]]
        has_oracle = any("val_kl" in metrics for metrics in graded)
        return "oracle KL on the data’s contexts" if has_oracle else "validation loss"

    @property
    def anchor(self) -> str:
        kind = "study" if self.is_study else "runs"
        digest = hashlib.sha256(self.knobs.encode()).hexdigest()[:6]
        return f"{self.task}-{self.steps}-{kind}-{digest}"


def make_sections(records: Sequence[Record], n_planned: int = 0) -> list[Section]:
    """Return a section for each task, training length and knobs: of studies, then of single runs.

    n_planned: number of planned comparisons, including those without records. 0 if it is unknown.
    """
    found = [
        (is_study, own)
        for is_study in (True, False)
        for own in _by_task(r for r in records if (r["role"] != "single") == is_study)
    ]
    n_here = sum(_n_comparisons(own) for is_study, own in found if is_study)
    family = family_of(n_here, n_planned)
    sections = [_section(own, is_study=is_study, family=family) for is_study, own in found]
    return [replace(each, apart=_apart(each, sections)) for each in sections]


def _apart(section: Section, sections: Sequence[Section]) -> str:
    """Return the knobs of a section that some other section of the same task does not have."""
    all_knobs = [each.knobs.split(",") for each in sections if each.task == section.task]
    own = section.knobs.split(",")
    return ", ".join(knob for knob in own if not all(knob in knobs for knobs in all_knobs))


def _by_task(records: Iterable[Record]) -> list[list[Record]]:
    """Group records by task, training length and knobs, in this order."""
    groups = grouped(records, lambda r: (r["task"], r["steps"], knobs_of(r["spec"])))
    return [groups[key] for key in sorted(groups)]


def _n_comparisons(records: list[Record]) -> int:
    reported = filter(is_reported, records)
    return len({r["variant"] for r in reported if r["variant"] != r["base"]})


def _section(group: list[Record], *, is_study: bool, family: Family) -> Section:
    own = [record for record in group if record["role"] != "reference"]
    own = own if is_study else name_apart(own)
    return Section(
        task=group[0]["task"],
        steps=group[0]["steps"],
        knobs=knobs_of(group[0]["spec"]),
        apart="",
        is_study=is_study,
        records=own,
        references=[record for record in group if record["role"] == "reference"],
        metric=group[0]["primary"],
        higher_is_better=group[0]["higher_is_better"],
        entries=entries(own, is_study=is_study, threshold=family.threshold),
        family=family,
    )


def name_apart(records: Sequence[Record]) -> list[Record]:
    """Return single runs; runs of the same variant get their folders as a part of the name."""
    names = [record["variant"] for record in records]
    return [
        record | {"variant": f"{name} ({record['settings']['out_dir']})"}
        if names.count(name) > 1
        else record
        for name, record in zip(names, records, strict=True)
    ]


def finished_runs(section: Section) -> dict[str, list[Record]]:
    """Return the reported runs that did not diverge, by variant, in the leaderboard's order."""
    found: dict[str, list[Record]] = {entry.variant: [] for entry in section.entries}
    for record in section.records:
        if is_reported(record) and is_finished(record):
            found[record["variant"]].append(record)
    return {variant: own for variant, own in found.items() if own}
