"""Test that the committed results load and print the tables that the docs quote."""

import json
from pathlib import Path

import pytest

from studies.dagger.tables import tables_of
from studies.finetune import study as finetune
from studies.finetune.study import FinetuneResults, Pair
from studies.humanoid import matched
from studies.humanoid.grid import grid_table
from studies.humanoid.tables import table
from studies.rollout import embedding_table
from studies.step_noise import tables as step_noise

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "studies" / "results"


def rows_of(text):
    """Return the cells of each row of the tables in a Markdown text."""
    lines = [line.strip() for line in text.splitlines() if line.strip().startswith("|")]
    return {tuple(cell.strip() for cell in line.strip("|").split("|")) for line in lines}


def assert_quoted(text, quoted, n_results=2):
    """Assert that the text has tables with results, whose rows the docs contain."""
    rows = rows_of(text)
    assert len(rows) >= 2 + n_results  # a header and the line below it
    assert rows <= quoted


@pytest.fixture(scope="module")
def quoted():
    """Return the rows of all tables in the docs, without the lines below headers."""
    return set().union(*(rows_of(page.read_text()) for page in (ROOT / "docs").rglob("*.md")))


@pytest.mark.parametrize(
    "name",
    [
        *("optimizers", "noise", "whitening-0.5", "whitening-0.9", "demonstrations-20", "stand"),
    ],
)
def test_the_docs_quote_the_returns_of_clones(name, quoted):
    assert_quoted(table(RESULTS / "humanoid" / name), quoted)


def test_the_docs_quote_the_longest_runs_of_the_only_optimizer_that_had_them(quoted):
    assert_quoted(table(RESULTS / "humanoid/ten-times-the-steps"), quoted, n_results=1)


def test_the_docs_quote_the_rollouts_with_an_embedding_rate(quoted):
    assert_quoted(embedding_table.table(RESULTS / "embedding_rate"), quoted)


def test_the_docs_quote_the_comparison_of_clones_at_equal_loss(quoted):
    rows = json.loads((RESULTS / "humanoid_matched.json").read_text())["rows"]
    assert_quoted(matched.table_of(rows), quoted)


def test_the_docs_quote_the_grid_of_clones_and_why_exact_mode_is_better(quoted):
    assert_quoted(grid_table(RESULTS / "humanoid"), quoted)
    assert_quoted(table(RESULTS / "humanoid/why-exact", "dopr-adamw"), quoted)
    for base in ("adamw", "signum"):
        own = RESULTS / f"humanoid/own-sigma-{base}"
        another = RESULTS / f"humanoid/own-sigma-{base}-another"
        assert_quoted(table(own, f"dopr-{base}", first_seed=205), quoted)
        assert_quoted(table(another, f"dopr-{base}", own, first_seed=205), quoted, n_results=1)
    for size in (64, 256):
        folder = RESULTS / f"humanoid/own-batch-{size}"
        assert_quoted(table(folder, "dopr-adamw+sigma_beta=0.95"), quoted)


def test_the_docs_quote_what_steps_have_in_common(quoted):
    rows = json.loads((RESULTS / "step_noise.json").read_text())["rows"]
    assert_quoted(step_noise.table(rows), quoted)


def test_the_docs_quote_the_tables_of_dagger(quoted):
    rows = json.loads((RESULTS / "dagger.json").read_text())["rows"]
    assert_quoted(tables_of(rows), quoted)


def test_the_results_of_fine_tuning_are_complete(monkeypatch):
    path = RESULTS / "finetune.json"
    protocol = json.loads(path.read_text())["protocol"]
    monkeypatch.setattr(finetune, "sha256_of", lambda path: protocol["pretrained_sha256"])
    monkeypatch.setattr(finetune, "load", lambda path: (None, None))
    results = FinetuneResults(path, Path("model"))
    monkeypatch.setattr(results, "make", pytest.fail)  # no run is missing
    assert rows_of(finetune.tables([Pair(results, name) for name in finetune.PAIRS]))
