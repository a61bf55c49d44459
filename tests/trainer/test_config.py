"""Settings have an order of precedence and a type, and one error lists every problem."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest

from trainer.config import describe, describe_changes, load_config, to_json
from trainer.settings import FIELDS, ConfigError, TrainConfig


def write(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


def test_command_line_beats_later_files_beat_earlier_files_beat_defaults(tmp_path):
    first = write(tmp_path / "a.py", "lr = 1e-3\nseed = 1\nbeta2 = 0.9\n")
    second = write(tmp_path / "b.py", "seed = 2\nbeta2 = 0.8\n")
    config, origins = load_config(["--beta2=0.7", first, second])
    assert (config.lr, config.seed, config.beta2) == (1e-3, 2, 0.7)
    assert origins == {"lr": first, "seed": second, "beta2": "command line"}
    assert config.n_layer == FIELDS["n_layer"].default


@pytest.mark.parametrize(
    ("argument", "key", "value"),
    [
        ("--max_steps=1e3", "max_steps", 1000),
        ("--lr=1", "lr", 1.0),
        ("--compile=true", "compile", True),
        ("--bias=False", "bias", False),
        ("--out_dir=a=b", "out_dir", "a=b"),
        ("--aux_lr=none", "aux_lr", None),
        ("--schedule=wsd", "schedule", "wsd"),
    ],
)
def test_values_are_coerced_to_the_declared_type(argument, key, value):
    config, _ = load_config([argument])
    assert getattr(config, key) == value
    assert type(getattr(config, key)) is type(value)


@pytest.mark.parametrize(
    "argument",
    [
        *("--max_steps=1.5", "--lr=fast", "--compile=1", "--bias=yes", "--schedule=cos"),
        *("--seed=nan", "--seed=4294967296", "--lr=nan", "--lr=inf", "--lr=0", "--dropout=1"),
        *("--n_layer=0", "--aux_lr=0.1", "--sigma_beta=x"),
    ],
)
def test_a_value_of_the_wrong_type_or_range_is_refused_by_name(argument):
    key = argument[2:].split("=")[0]
    with pytest.raises(ConfigError, match=key):
        load_config([argument])


def test_every_problem_of_every_source_is_in_one_error(tmp_path):
    file = write(tmp_path / "bad.py", "weight_decy = 0.1\nn_head = 5\n")
    with pytest.raises(ConfigError) as caught:
        load_config(
            [file, "--lr=-1", "--compile=maybe", "--batch_size=7", "--oops", "missing.py"],
            lambda settings: [f"device={settings['device']}: not here"],
        )
    text = str(caught.value)
    assert f"{file}: unknown key 'weight_decy'; did you mean 'weight_decay'?" in text
    for part in ("n_embd=768", "lr=-1", "compile='maybe'", "batch_size=7", "--oops", "missing.py"):
        assert part in text
    assert "device=auto: not here" in text


def test_a_config_file_runs_in_a_namespace_of_its_own(tmp_path):
    file = write(tmp_path / "c.py", "_tokens = 4096\nbatch_size = _tokens // 64\n")
    config, _ = load_config([file, "--micro_batch_size=8"])
    assert config.batch_size == 64


def test_an_error_inside_a_config_file_names_the_file(tmp_path):
    file = write(tmp_path / "broken.py", "lr = 1 / 0\n")
    with pytest.raises(ConfigError, match=r"broken\.py: ZeroDivisionError"):
        load_config([file])


def test_help_lists_every_setting_with_its_comment(capsys):
    with pytest.raises(SystemExit) as caught:
        load_config(["--help"])
    text = capsys.readouterr().out
    assert caught.value.code == 0
    assert all(f"--{key}=" in text for key in FIELDS)
    assert "of the AdamW beside muon and adamuon" in text


def test_a_name_of_an_earlier_release_is_accepted_with_a_warning(tmp_path, capsys):
    file = write(tmp_path / "old.py", "kernel = 'torch'\nmuon_scale = 'match_rms'\n")
    config, origins = load_config([file, "--coefficients=quintic"])
    assert (config.backend, config.adjust_lr) == ("torch", "match_rms_adamw")
    assert config.ns_coefficients == "quintic"
    assert origins["backend"] == file
    assert capsys.readouterr().out.splitlines() == [
        f"warning: {file}: kernel is now called backend; please rename it",
        f"warning: {file}: muon_scale is now called adjust_lr; please rename it",
        "warning: command line: coefficients is now called ns_coefficients; please rename it",
    ]


def test_an_old_value_of_a_current_setting_is_accepted_with_a_warning(capsys):
    config, _ = load_config(["--adjust_lr=match_rms"])
    assert config.adjust_lr == "match_rms_adamw"
    assert "adjust_lr=match_rms is now called adjust_lr=match_rms_adamw" in capsys.readouterr().out


def test_a_removed_setting_says_what_to_do():
    with pytest.raises(ConfigError, match="ns_steps is no longer a setting: remove it"):
        load_config(["--ns_steps=5"])


def test_a_bad_value_under_an_earlier_name_is_refused_by_the_current_name():
    with pytest.raises(ConfigError, match="backend='cuda': must be one of auto, torch, triton"):
        load_config(["--kernel=cuda"])


def test_reading_settings_does_not_import_torch():
    code = (
        "import sys; from trainer.config import load_config, help_text\n"
        "load_config(['--lr=1']); help_text(); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_description_shows_what_was_set_and_where():
    config, origins = load_config(["--lr=0.01", "--seed=1337"])
    text = describe(config, origins)
    assert "lr = 0.01  (command line)" in text
    assert "seed" not in text  # given, but equal to its default


def test_json_round_trips():
    config, _ = load_config(["--lr=0.01", "--optimizer=muon", "--aux_lr=0.02"])
    assert TrainConfig(**json.loads(to_json(config))) == config


def test_changes_on_resume_are_named_unless_they_cannot_matter():
    saved = dataclasses.asdict(TrainConfig()) | {"lr": 0.5, "out_dir": "elsewhere"}
    text = describe_changes(saved, TrainConfig())
    assert "lr was 0.5" in text
    assert "out_dir" not in text


@pytest.mark.parametrize("path", sorted(Path("config").glob("*.py")), ids=lambda path: path.name)
def test_ready_configs_are_valid_and_short(path):
    load_config([str(path)])
    assert len(path.read_text().splitlines()) <= 25
