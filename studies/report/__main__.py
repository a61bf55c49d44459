"""One page about graded models: python -m studies.report out/compare/pdfa out/compare/ctrl out/run

A folder is a study of studies.sweep.compare, or a run that eval.rollout.ttf graded. Writes report.html, which needs
nothing but itself, and its figures as PNG files.
"""

import base64
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from eval.command import command_parser
from studies.report import details
from studies.report.figures import draw
from studies.report.format import metric_label
from studies.report.leaderboard import BAR
from studies.report.sections import Section, make_sections
from studies.report.style import looks, save_png, svg
from studies.report.summary_text import below_leaderboard, on_matched
from studies.stats import consistency
from studies.stats import temperatures as tempered
from studies.stats.analysis import AnalysisError, Record, load_records
from studies.stats.consistency import knobs_of
from studies.stats.matched import quantity

NEEDED = (  # of a record; the rest is optional
    *("task", "spec", "primary", "higher_is_better", "variant", "base", "role", "lr", "seed"),
    *("steps", "tokens", "val_loss", "grade", "command", "environment", "seconds", "settings"),
)
TEMPLATE = "report.html.j2"


@dataclass
class Source:
    """What the folders hold."""

    records: list[Record] = field(default_factory=list)
    tempered: list[Record] = field(default_factory=list)  # at their optimizer's temperature
    protocols: list[dict[str, Any]] = field(default_factory=list)  # of the studies


def read(paths: Sequence[Path]) -> Source:
    """All of these folders; AnalysisError says what is wrong."""
    source = Source()
    for path in paths:
        try:
            found = load_records([path])
            if (path / "records.jsonl").exists():
                source.protocols.append(json.loads((path / "protocol.json").read_text()))
        except FileNotFoundError as error:
            raise AnalysisError(f"{error.filename}: not there; it says what was planned") from None
        except json.JSONDecodeError as error:
            raise AnalysisError(f"{path}: not JSON, a record or the protocol ({error})") from None
        _check(path, found)
        source.records += found
        source.tempered += tempered.load(path, found)
    return source


def _check(path: Path, records: list[Record]) -> None:
    if not records:
        raise AnalysisError(
            f"{path}: records.jsonl has no records; run `python -m studies.sweep.compare`"
        )
    for number, record in enumerate(records, start=1):
        if lacks := [key for key in NEEDED if key not in record]:
            raise AnalysisError(f"{path}: record {number} lacks {', '.join(lacks)}; grade it again")


def write_report(paths: Sequence[Path], out: Path, n_planned: int = 0) -> Path:
    """Writes the page and its figures to `out`; returns the page's path.

    n_planned: comparisons of the family that is judged together; 0: those on the page.
    """
    source = read(paths)
    consistency.check(source.records)
    out.mkdir(parents=True, exist_ok=True)
    sections = make_sections(source.records, n_planned)
    page = out / "report.html"
    content = render([_content(section, source, out) for section in sections], source)
    page.write_text(content, encoding="utf-8", errors="backslashreplace")
    return page


def render(sections: list[dict[str, Any]], source: Source) -> str:
    """The page as HTML; all text from records is escaped."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    return environment.get_template(TEMPLATE).render(
        sections=sections,
        overview=overview(sections),
        family=sections[0]["about"].family,
        n_runs=len(source.records),
        protocols=[(each["command"], json.dumps(each, indent=1)) for each in source.protocols],
        environments=details.distinct(record["environment"] for record in source.records),
        BAR=BAR,
    )


def overview(sections: list[dict[str, Any]]) -> dict[str, Any]:
    """Studies as columns, variants as rows, how each did against its base; only if it says more."""
    columns = [each for each in sections if each["about"].is_study]
    boards = [{entry.variant: entry for entry in each["about"].entries} for each in columns]
    names = {e.variant for board in boards for e in board.values() if e.variant != e.base}
    rows = [(name, [board.get(name) for board in boards]) for name in sorted(names)]
    return {"columns": columns if len(columns) > 1 else [], "rows": rows}


def _content(section: Section, source: Source, out: Path) -> dict[str, Any]:
    """What the template shows of a section; its figures are written on the way."""
    return {
        "about": section,
        "metric": metric_label(section.metric),
        "seeds": sorted({r["seed"] for r in section.records if r["role"] != "tuning"}),
        "colours": {look.base: look.colour for look in looks(section.records).values()},
        "figures": _figures(section, out),
        "curves": {name for r in section.records if r["grade"] for name in r["grade"]["curves"]},
        "references": details.reference_rows(section),
        "remarks": below_leaderboard(section.records),
        "quantity": quantity(section.records[0]),
        "matched": details.matched_table(section),
        "placebo": details.placebo_table(section),
        "temperature": details.temperature_table(_tempered(section, source)),
        "matched_remark": on_matched(section.records) if section.n_comparisons else "",
        "metrics": details.metrics_table(section),
        "episodes_left": details.episodes_left(section),
        "samples": details.samples(section),
        "incidents": details.incidents(section, source.protocols),
        "lost_rates": details.lost_rates(section),
        "fingerprints": details.fingerprints(section),
        "grading": details.grading(section),
        "runs": details.all_runs([*section.records, *section.references]),
    }


def _tempered(section: Section, source: Source) -> list[Record]:
    """Those of the same task, knobs and length; single runs have none."""
    board = section.is_study, section.knobs, section.steps
    return [r for r in source.tempered if (True, knobs_of(r["spec"]), r["steps"]) == board]


def _figures(section: Section, out: Path) -> dict[str, str]:
    """Data URIs by name, of SVG images; the same as PNG files in `out`."""
    found = {}
    for name, figure in draw(section.records).items():
        save_png(figure, out / f"{section.anchor}-{name}.png")
        content = base64.b64encode(svg(figure).encode()).decode()
        found[name] = f"data:image/svg+xml;base64,{content}"
    return found


def main(argv: list[str]) -> int:
    parser = command_parser("studies.report", __doc__)
    parser.add_argument("folders", type=Path, nargs="+", help="studies or graded runs")
    parser.add_argument("--out", type=Path, default=Path("out/report"), help="a folder")
    about = "planned in all, also those not on the page; a star is for p below 0.05 / N"
    parser.add_argument("--comparisons", type=int, default=0, metavar="N", help=about)
    arguments = parser.parse_args(argv)
    try:
        if arguments.comparisons < 0:
            raise AnalysisError(f"--comparisons={arguments.comparisons}: must not be negative")
        print(write_report(arguments.folders, arguments.out, arguments.comparisons))
    except (AnalysisError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
