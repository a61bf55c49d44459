"""Write a report: one HTML page that embeds its figures, and the figures as PNG files."""

import base64
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from studies.report import details
from studies.report.figures import draw
from studies.report.format import metric_label
from studies.report.leaderboard import BAR
from studies.report.sections import Section, make_sections
from studies.report.source import Source, read
from studies.report.style import looks, save_png, svg
from studies.report.summary_text import below_leaderboard, on_matched
from studies.stats import consistency
from studies.stats.consistency import knobs_of
from studies.stats.errors import error_of
from studies.stats.matched import quantity
from studies.stats.records import Record

TEMPLATE = "report.html.j2"


def write_report(folders: Sequence[Path], out: Path, n_planned: int = 0) -> Path:
    """Write the page and its figures to `out`; return the page's path.

    Args:
        folders: studies or graded runs.
        out: the folder to write to.
        n_planned: number of comparisons that are judged together. Defaults to those on the page.
    """
    source = read(folders)
    consistency.check(source.records)
    out.mkdir(parents=True, exist_ok=True)
    sections = make_sections(source.records, n_planned)
    page = out / "report.html"
    content = render([_content(section, source, out) for section in sections], source)
    page.write_text(content, encoding="utf-8", errors="backslashreplace")
    return page


def render(sections: list[dict[str, Any]], source: Source) -> str:
    """Return the page as HTML; all text from records is escaped."""
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
    """Return a table of variants (rows) by studies (columns); empty for fewer than two studies."""
    columns = [each for each in sections if each["about"].is_study]
    boards = [{entry.variant: entry for entry in each["about"].entries} for each in columns]
    names = {e.variant for board in boards for e in board.values() if e.variant != e.base}
    rows = [(name, [board.get(name) for board in boards]) for name in sorted(names)]
    return {"columns": columns if len(columns) > 1 else [], "rows": rows}


def _content(section: Section, source: Source, out: Path) -> dict[str, Any]:
    """Return what the template shows of a section, and write the section's figures."""
    return {
        "about": section,
        "metric": metric_label(section.metric),
        "error": error_of(section.records[0]).formula(metric_label(section.metric)),
        "seeds": sorted({r["seed"] for r in section.records if r["role"] != "tuning"}),
        "colours": {look.base: look.colour for look in looks(section.records).values()},
        "figures": _figures(section, out),
        "curves": {name for r in section.records if r["grade"] for name in r["grade"]["curves"]},
        "references": details.reference_rows(section),
        "remarks": below_leaderboard(section.records),
        "quantity": quantity(section.records[0]),
        "matched": details.matched_table(section),
        "placebo": details.placebo_table(section),
        "temperature": details.temperature_table(_at_temperatures(section, source)),
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


def _at_temperatures(section: Section, source: Source) -> list[Record]:
    """Return the records at other temperatures of a section; single runs have none."""
    key = section.is_study, section.knobs, section.steps
    return [r for r in source.at_temperatures if (True, knobs_of(r["spec"]), r["steps"]) == key]


def _figures(section: Section, out: Path) -> dict[str, str]:
    """Return the figures as {name: data URI of an SVG image}, and write them to `out` as PNG."""
    found = {}
    for name, figure in draw(section.records).items():
        save_png(figure, out / f"{section.anchor}-{name}.png")
        content = base64.b64encode(svg(figure).encode()).decode()
        found[name] = f"data:image/svg+xml;base64,{content}"
    return found
