"""Test that a study is added to the board if it keeps the rules, and refused otherwise."""

import json

import pytest

from eval.rollout.record import write_records
from studies.rollout.all_stages import RolloutStage
from studies.stats.records import read_records
from studies.submit import __main__ as command
from studies.submit import rules
from studies.submit.repeat import chosen_run, hidden_seeds
from studies.sweep import compare

pytestmark = pytest.mark.xdist_group("submit")  # its fixtures are slow

REVISION = "0123abc"
STAGE = RolloutStage("lds", "lds", 20, ("sgd", "fast-dopr-sgd"), seeds=3, tuning_seeds=1)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Return the files of a finished study that keeps the rules."""
    folder = tmp_path_factory.mktemp("study")
    argv = STAGE.argv(folder, 1)
    compare.main(argv)
    records = read_records(folder / "lds/records.jsonl")
    for record in records:
        record["environment"]["git"] = REVISION
    return records, json.loads((folder / "lds/protocol.json").read_text())


@pytest.fixture
def study(finished, tmp_path, monkeypatch):
    """Return a function that writes the study with changes, and submits it."""
    monkeypatch.setattr(rules, "STAGES", (STAGE,))
    monkeypatch.setattr(command, "provenance", lambda device: {"git": REVISION})
    records, protocol = (json.loads(json.dumps(each)) for each in finished)

    def submit(*options, change=None):
        if change:
            change(records, protocol)
        folder = tmp_path / "study"
        folder.mkdir(exist_ok=True)
        write_records(folder / "records.jsonl", records)
        (folder / "protocol.json").write_text(json.dumps(protocol))
        places = ["--board", tmp_path / "board", "--out", tmp_path / "hidden", "--workers", 1]
        command.main([str(folder), *map(str, places), *options])
        return tmp_path / "board/lds"

    return submit


@pytest.mark.usefixtures("synchronous")
def test_a_study_that_keeps_the_rules_is_repeated_and_added(study, finished, capsys):
    place = study()
    assert read_records(place / "records.jsonl") == sorted(
        finished[0], key=lambda record: (record["variant"], record["lr"], record["seed"])
    )
    hidden = read_records(place / "hidden.jsonl")
    assert {record["seed"] for record in hidden} == {*hidden_seeds(REVISION, "lds")}
    assert {record["variant"] for record in hidden} == {"sgd", "fast-dopr-sgd"}
    rates = {record["variant"]: record["lr"] for record in finished[0] if record["role"] == "fresh"}
    assert all(record["lr"] == rates[record["variant"]] for record in hidden)
    text = capsys.readouterr().out
    assert "was repeated bit for bit" in text
    assert text.count("fast-dopr-sgd") >= 2
    assert "studies.submit" in json.loads((place / "protocol.json").read_text())["command"]


def test_check_runs_nothing_and_adds_nothing(study, capsys):
    assert not study("--check").exists()
    assert "keep the rules" in capsys.readouterr().out


def set_field(role, key, value, variant=None):
    def change(records, protocol):
        for record in records:
            if record["role"] == role and variant in (None, record["variant"]):
                record[key] = value

    return change


def drop(role, variant="fast-dopr-sgd", n=1):
    def change(records, protocol):
        found = [r for r in records if r["role"] == role and r["variant"] == variant]
        for record in found[:n]:
            records.remove(record)

    return change


def edit(action):
    return lambda records, protocol: action(records, protocol)


def of_role(records, role):
    return next(each for each in records if each["role"] == role and each["variant"] == "sgd")


BROKEN = {
    "other steps": (edit(lambda r, p: p.update(steps=10)), "steps is 10, must be 20"),
    "more tuning": (edit(lambda r, p: p.update(tuning_seeds=4)), "tuning_seeds is 4, must be 1"),
    "other settings": (edit(lambda r, p: p.update(settings={"x": 1})), "settings is {'x': 1}"),
    "another task": (edit(lambda r, p: p.update(task="x")), "task 'x' is not on the board: lds"),
    "a seed too few": (drop("fresh"), "fast-dopr-sgd: needs fresh runs on the seeds"),
    "no base": (edit(lambda r, p: p["variants"].pop("sgd")), "its base sgd is missing"),
    "sweep cut short": (drop("tuning", n=9), "the sweep has to begin with the rates"),
    "another rate": (set_field("fresh", "lr", 1e-3, "sgd"), "but the fresh runs have {0.001}"),
    "two revisions": (
        edit(lambda r, p: r[0]["environment"].update(git="other")),
        "the runs are of revision 0123abc, other, but this is 0123abc",
    ),
    "two torches": (edit(lambda r, p: r[0]["environment"].update(torch="1")), "several versions"),
    "hidden momentum": (
        edit(lambda r, p: r[0]["asked"].update(momentum=0.5)),
        "departs from the rules: momentum was 0.5",
    ),
    "an optimizer that the study does not have": (
        edit(lambda r, p: r.append(r[-1] | {"variant": "magic"})),
        "records of runs that the study does not have: magic",
    ),
    "a role that is not compared": (
        edit(lambda r, p: r.append(r[-1] | {"role": "single"})),
        "records of runs that the study does not have",
    ),
    "a rate off the grid": (
        edit(lambda r, p: r.append(of_role(r, "tuning") | {"lr": 0.15})),
        "sgd: the sweep has rates off its factor-2 grid (0.15)",
    ),
    "no records": (edit(lambda r, p: r.clear()), "contains no records.jsonl"),
}


@pytest.mark.parametrize(("change", "message"), BROKEN.values(), ids=BROKEN)
def test_a_broken_rule_is_named_and_nothing_is_added(study, tmp_path, capsys, change, message):
    with pytest.raises(SystemExit) as error:
        study(change=change)
    assert error.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "board").exists()


def test_the_base_has_to_run_at_the_rate_of_its_variant(tmp_path):
    study = compare.study_of(compare.parse(STAGE.argv(tmp_path, 1))[1])
    variant = study.variants[1]

    def run(name, role, lr):
        return [{"variant": name, "role": role, "lr": lr, "seed": seed} for seed in study.seeds]

    records = [*run("sgd", "fresh", 0.1), *run(variant.name, "fresh", 0.2)]
    (problem,) = rules._seed_problems(study, variant, records)
    assert problem == "sgd: needs runs at the rate of fast-dopr-sgd on [200, 201, 202]"
    assert not rules._seed_problems(study, variant, [*records, *run("sgd", "control", 0.2)])


def test_a_run_that_cannot_be_repeated_is_refused(study, finished, tmp_path, capsys):
    chosen = chosen_run(finished[0], REVISION)

    def change(records, protocol):
        record = next(
            each
            for each in records
            if all(each[key] == chosen[key] for key in ("variant", "seed", "role"))
        )
        record["val_loss"] *= 1 + 1e-15

    with pytest.raises(SystemExit):
        study(change=change)
    assert "cannot be repeated bit for bit" in capsys.readouterr().err
    assert not (tmp_path / "board").exists()


def test_uncommitted_code_is_refused(study, monkeypatch, capsys):
    monkeypatch.setattr(command, "provenance", lambda device: {"git": f"{REVISION}-dirty"})
    with pytest.raises(SystemExit):
        study()
    assert "has to be committed without changes" in capsys.readouterr().err


def test_hidden_seeds_follow_from_the_revision_and_the_task():
    seeds = hidden_seeds("a", "pdfa")
    assert len({*seeds}) == 5
    assert seeds == hidden_seeds("a", "pdfa")
    assert not {*seeds} & {*hidden_seeds("b", "pdfa"), *hidden_seeds("a", "ctrl"), *range(1000)}


@pytest.mark.usefixtures("synchronous")
def test_a_second_submission_replaces_all_records_of_its_optimizers(study, finished, tmp_path):
    """Hidden seeds of another revision are other seeds, and must not be mixed."""
    place = tmp_path / "board/lds"
    place.mkdir(parents=True)
    older = [
        record | {"seed": 7, "environment": {"git": "older", "torch": "2"}}
        for record in finished[0]
        if record["role"] in ("fresh", "tuning")
    ]
    other = [record | {"variant": "adamw", "base": "adamw"} for record in older]
    for name in ("records.jsonl", "hidden.jsonl"):
        write_records(place / name, older[:1] + other[-1:])
    study()
    for name in ("records.jsonl", "hidden.jsonl"):
        kept = [r for r in read_records(place / name) if r["environment"]["git"] == "older"]
        assert [record["variant"] for record in kept] == ["adamw"]


@pytest.mark.parametrize("options", [(), ("--check",)])
def test_a_base_is_submitted_with_all_that_the_board_compares_with_it(
    study, finished, tmp_path, capsys, options
):
    place = tmp_path / "board/lds"
    place.mkdir(parents=True)
    exact = [record | {"variant": "dopr-sgd"} for record in finished[0] if record["base"] == "sgd"]
    write_records(place / "hidden.jsonl", exact[:1])
    with pytest.raises(SystemExit):
        study(*options)
    assert "the board compares dopr-sgd with a base of this study" in capsys.readouterr().err
    assert [path.name for path in place.iterdir()] == ["hidden.jsonl"]
