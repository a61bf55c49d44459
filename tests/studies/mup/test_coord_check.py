"""Test the slopes and verdicts of the coordinate check, and its command."""

import json

import pytest
import torch

from model import GPT, GPTConfig
from studies.mup.coord_check import main, problems, slopes_of, tables, verdict
from studies.mup.coordinates import KINDS, activations
from studies.mup.figures import coordinates_figure
from studies.mup.grid import numbers
from studies.mup.slopes import slope
from tests.studies.mup.width_records import TINY, WIDTHS, sized
from tests.studies.records import read_lines


@pytest.mark.parametrize("exponent", [-0.5, 0.0, 1.25])
def test_the_slope_of_a_power_of_the_width_is_its_exponent(exponent):
    found = slopes_of(sized({("fc", 1): exponent}))["fc", 1]
    assert found.mean == pytest.approx(exponent, abs=1e-9)
    assert found.hi - found.lo == pytest.approx(0, abs=1e-9)


def test_slopes_are_fitted_for_each_seed_and_need_two_widths():
    rows = sized({})[:3]  # one width
    assert slope(rows, lambda record: 1.0).n == 0
    rows = [row | {"size": row["width"] ** (row["seed"] / 10)} for row in sized({})]
    assert slope(rows, lambda record: record["size"]).mean == pytest.approx(0.1)
    assert slope(rows, lambda record: record["size"]).hi > 0.2


def test_a_check_with_a_diverged_run_does_not_pass():
    rows = sized({})
    rows[0] = {key: value for key, value in rows[0].items() if key != "coordinates"}
    assert not verdict("mup", slopes_of(rows), 32)[0]


@pytest.mark.parametrize(
    ("exponents", "words"),
    [
        ({}, None),
        ({("fc", 8): 0.14, ("qkv", 1): -0.14, ("logits", 8): 0.19, ("logits", 1): -0.5}, None),
        ({("fc", 8): 0.16}, "fc t=8: +0.16"),
        ({("residual", 1): -0.16}, "residual t=1: -0.16"),
        ({("qkv", 0): 0.06}, "qkv t=0: +0.06"),
        ({("logits", 8): -0.21}, "logits t=8: -0.21"),
    ],
)
def test_muP_passes_if_no_slope_exceeds_its_limit(exponents, words):
    found = problems(slopes_of(sized(exponents)), narrowest=32)
    assert found == [] if words is None else (len(found) == 1 and found[0].startswith(words))


def test_wide_models_have_a_stricter_limit():
    slopes = slopes_of(sized({("fc", 8): 0.12}))
    assert not problems(slopes, narrowest=64)
    assert problems(slopes, narrowest=128)


def test_the_control_passes_with_slopes_of_zero_and_fails_with_those_of_sp():
    flat = [row | {"parametrisation": "sp"} for row in sized({})]
    assert tables(flat)[0] is False
    assert "PASSES: qkv t=0: +0.00, wanted 0.5 ± 0.1" in tables(flat)[1]
    slopes = {("qkv", 0): 0.45, ("fc", 0): 0.55, ("mlp out", 1): 0.6, ("logits", 8): 0.5}
    steep = [row | {"parametrisation": "sp"} for row in sized(slopes)]
    assert tables(steep)[0] is True
    assert "fails, as it should" in tables(steep)[1]


def test_a_control_without_a_slope_is_not_accepted():
    slopes = {("qkv", 0): 0.5, ("fc", 0): 0.5, ("mlp out", 1): 0.6, ("logits", 8): 0.6}
    rows = sized(slopes)
    del rows[0]["coordinates"]["residual"]
    assert not verdict("sp", slopes_of(rows), 32)[0]


def test_a_single_width_has_no_verdict():
    good, text = tables([row for row in sized({}) if row["width"] == 64])
    assert good
    assert "open: one width has no slope" in text


@pytest.mark.parametrize("spared", [("qkv", 0), ("fc", 0), ("mlp out", 1), ("logits", 8)])
def test_the_control_must_fail_each_check(spared):
    slopes = {("qkv", 0): 0.5, ("fc", 0): 0.5, ("mlp out", 1): 0.6, ("logits", 8): 0.6}
    good, text = verdict("sp", slopes_of(sized(slopes | {spared: 0.3})), 32)
    assert not good
    assert text.startswith("PASSES: ")
    assert text.count("wanted") == 1


def test_the_tables_report_the_ratio_of_preconditioned_to_plain_gradients():
    assert "| attn.c_attn | -0.50 ± 0.00 |" in tables(sized({}))[1]


def test_the_activations_of_every_layer_are_measured():
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=11, block_size=8, n_layer=3, n_head=2, n_embd=16))
    x = torch.randint(11, (2, 8))
    found = activations(model, x)
    assert {kind: len(found[kind]) for kind in KINDS} == dict.fromkeys(KINDS, 3) | {"embedding": 1}
    assert torch.equal(found["logits"][0], model(x)[0])
    assert found["qkv"][0].shape == (2, 8, 48)
    assert not any(module._forward_hooks for module in model.modules())


def test_the_figure_has_a_panel_for_each_kind():
    rows = sized({})
    rows[0]["coordinates"]["fc"]["1"] = None  # it was not finite
    assert len(coordinates_figure(rows).axes) == len(KINDS) + 1


def command(dataset, out, *more):
    words = ["--out", str(out), "--seeds", "0", "--widths", "16,32", "--workers", "1", *more]
    return [*words, "--set", f"dataset={dataset}", *TINY, "mup_base_width=32"]


@pytest.mark.slow
def test_the_command_checks_a_tiny_model_and_continues_its_grid(dataset, tmp_path, capsys):
    axes = ["--optimizers", "dopr-muon", "--parametrisations"]
    main(command(dataset, tmp_path, *axes, "sp"))
    first = (tmp_path / "runs/dopr-muon-sp-16-0-0/record.json").read_text()
    assert "| dopr-muon | sp | 0.0078 | 16 to 32 | 1 |" in capsys.readouterr().out
    main(command(dataset, tmp_path, *axes, "sp,mup"))
    assert (tmp_path / "runs/dopr-muon-sp-16-0-0/record.json").read_text() == first
    rows = read_lines(tmp_path / "records.jsonl")
    assert [(row["parametrisation"], row["width"]) for row in rows] == [
        (kind, width) for kind in ("mup", "sp") for width in (16, 32)
    ]
    at_base = [row for row in rows if row["width"] == 32]
    assert at_base[0]["coordinates"] == at_base[1]["coordinates"]
    assert set(at_base[0]["ap"]) == {"attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"}
    assert not [*tmp_path.glob("runs/*/checkpoints")]
    assert {path.suffix for path in tmp_path.glob("coordinates*")} == {".md", ".png"}


def refusal(arguments, capsys):
    """Return the message with which the command ends with exit code 2."""
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "code"), [([], 1), (["--widths", "16"], 0), (["--shard", "1/2"], 0)]
)
def test_a_part_of_a_grid_has_no_verdict(dataset, tmp_path, monkeypatch, more, code):
    flat = [row | {"parametrisation": "sp"} for row in sized({})]  # a control that passes
    monkeypatch.setattr("studies.mup.grid.run_grid", lambda *_: flat)
    assert main(command(dataset, tmp_path, "--optimizers", "adamw", *more)) == code


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("adamw-mup-16-0-0/record.json", {"asked": {"n_layer": 7}}, "holds another run"),
        ("adamw-mup-16-0-0/config.json", {"weight_decay": 0.5}, "weight_decay was 0.5, is 0.0"),
        ("adamw-mup-16-0-0/config.json", [], "Input should be an object"),
        (
            "adamw/record.json",
            {"variant": "adamw", "asked": {"n_embd": 64, "beta2": 0.5}},
            "runs/adamw has other settings than this command: ",
        ),
        (
            "muon/record.json",
            {"variant": "muon", "asked": {"n_embd": 64, "beta2": 0.5}},
            None,
        ),
    ],
)
def test_a_folder_with_runs_of_other_settings_is_refused(
    dataset, tmp_path, capsys, monkeypatch, file, content, message
):
    path = tmp_path / "runs" / file
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(content))
    monkeypatch.setattr("studies.mup.grid.run_grid", lambda *_: sized({}))
    arguments = command(dataset, tmp_path, "--optimizers", "adamw")
    if message:
        assert message in refusal(arguments, capsys)
    else:
        main(arguments)  # the run of another optimizer


def test_missing_data_are_an_error_before_any_run(tmp_path, capsys):
    assert "dataset 'nowhere': neither a folder nor" in refusal(
        command("nowhere", tmp_path, "--optimizers", "adamw"), capsys
    )
    assert not [*tmp_path.glob("runs/*")]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--optimizers", "adamm"], "NAME is one of"),
        (["--optimizers", "adamw+mup=true"], "mup is fixed here"),
        (["--optimizers", "adamw", "--widths", "15"], "must be divisible by n_head=2"),
        (["--optimizers", "adamw", "--shard", "3/2"], "argument --shard"),
        (["--optimizers", "adamw", "--shard", "5/5"], "is empty, the grid has 3 runs"),
        (["--optimizers", "adamw", "--widths", "wide"], "argument --widths"),
        (["--optimizers", "adamw", "--octaves=2:1"], "argument --octaves"),
        (["--optimizers", "adamw", "--parametrisations", "muP"], "'muP': must be sp or mup"),
    ],
)
def test_a_wrong_command_is_refused(dataset, tmp_path, capsys, more, message):
    assert message in refusal(command(dataset, tmp_path, *more), capsys)
    assert not [*tmp_path.glob("runs/*")]


def test_numbers_are_lists_or_ranges_without_repetition():
    assert numbers("32,64") == [32, 64]
    assert numbers("-2:1") == [-2, -1, 0, 1]
    assert numbers("2,1,2") == [2, 1]
    assert WIDTHS == tuple(numbers("32,64,128,256"))
