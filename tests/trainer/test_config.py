"""Settings have an order of precedence and a type, and one error lists every problem."""

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from trainer import settings
from trainer.config import describe, describe_changes, load_config, to_json
from trainer.settings import FIELDS, ConfigError, TrainConfig
from trainer.usage import help_text


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
        ("--seed=1_000", "seed", 1000),
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
        *("--n_layer=0", "--embedding_lr=0", "--sigma_beta=x"),
    ],
)
def test_a_value_of_the_wrong_type_or_range_is_refused_by_name(argument):
    key = argument[2:].split("=")[0]
    with pytest.raises(ConfigError, match=key):
        load_config([argument])


@pytest.mark.parametrize("key", ["gamma", "sigma_beta"])
def test_what_is_not_a_number_is_refused_also_if_it_has_no_effect(tmp_path, key):
    preset = write(tmp_path / "preset.py", f"{key} = float('nan')")
    with pytest.raises(ConfigError, match=f"{key}=nan: must be finite"):
        load_config([preset])


def test_no_steps_are_one_problem():
    with pytest.raises(ConfigError) as caught:
        load_config(["config/demo.py", "--max_steps=0"])
    assert str(caught.value) == "max_steps=0: must be at least 1"


def test_every_problem_of_every_source_is_in_one_error(tmp_path):
    file = write(tmp_path / "bad.py", "weight_decy = 0.1\nn_head = 5\n")
    with pytest.raises(ConfigError) as caught:
        load_config(
            [file, "--lr=-1", "--compile=maybe", "--seed=-3", "--oops", "missing.py"],
            lambda settings: [f"device={settings['device']}: not here"],
        )
    text = str(caught.value)
    assert f"{file}: unknown key 'weight_decy'; did you mean 'weight_decay'?" in text
    for part in ("n_embd=768", "lr=-1", "compile='maybe'", "seed=-3", "--oops", "missing.py"):
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
    assert "of the AdamW beside an optimizer of matrices" in text
    assert "--sigma_beta=float | None [none]  decay" in text
    assert "fsdp shards, hsdp shards within groups" in text  # a comment of two lines


def test_a_name_of_an_earlier_release_is_accepted_with_a_warning(tmp_path, capsys):
    file = write(tmp_path / "old.py", "kernel = 'torch'\nmuon_scale = 'match_rms'\n")
    config, origins = load_config([file, "--coefficients=quintic", "--optimizer=muon"])
    assert (config.backend, config.adjust_lr) == ("torch", "match_rms_adamw")
    assert config.ns_coefficients == "quintic"
    assert origins["backend"] == file
    assert capsys.readouterr().out.splitlines() == [
        f"warning: {file}: kernel is now called backend; please rename it",
        f"warning: {file}: muon_scale is now called adjust_lr; please rename it",
        "warning: command line: coefficients is now called ns_coefficients; please rename it",
    ]


def test_an_old_value_of_a_current_setting_is_accepted_with_a_warning(capsys):
    config, _ = load_config(["--adjust_lr=match_rms", "--optimizer=muon"])
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
        "import sys; from trainer.config import load_config; from trainer.usage import print_help\n"
        "load_config(['--lr=1']); print_help(''); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_help_has_the_comment_of_every_setting():
    source = Path(settings.__file__).read_text().partition("class TrainConfig:")[2]
    lines = help_text("").splitlines()
    for key in FIELDS:
        (declaration,) = re.findall(rf"^    {key}: .* = .+", source, re.MULTILINE)
        (line,) = (each for each in lines if each.startswith(f"  --{key}="))
        assert declaration[-1] not in "(["  # continues, so the help would not find the comment
        assert declaration.partition("  # ")[2] in line


def test_the_description_shows_what_was_set_and_where():
    config, origins = load_config(["--lr=0.01", "--seed=1337"])
    text = describe(config, origins)
    assert "lr = 0.01  (command line)" in text
    assert "seed" not in text  # given, but equal to its default


def test_the_description_leaves_out_what_has_no_effect():
    preset = ["config/demo.py"]
    assert "fresh_mean = True" in describe(*load_config(preset))
    assert "fresh_mean" not in describe(*load_config([*preset, "--dopr=false"]))


def test_json_round_trips():
    config, _ = load_config(["--lr=0.01", "--optimizer=muon", "--aux_lr=0.02"])
    assert TrainConfig(**json.loads(to_json(config))) == config


def test_changes_on_resume_are_named_unless_they_cannot_matter():
    saved = dataclasses.asdict(TrainConfig()) | {"lr": 0.5, "out_dir": "elsewhere"}
    saved |= {"loader_workers": 2, "save_every": 7, "keep_checkpoints": 9}
    text = describe_changes(saved, TrainConfig())
    assert text.count("warning") == text.count("lr was 0.5") == 1


@pytest.mark.parametrize("path", sorted(Path("config").glob("*.py")), ids=lambda path: path.name)
def test_ready_configs_are_valid_and_short(path):
    load_config([str(path)])
    assert len(path.read_text().splitlines()) <= 25


@pytest.mark.parametrize("end", ["raise SystemExit(0)", "raise BaseException('boo')", "exit(0)"])
def test_a_config_file_that_ends_the_process_is_an_error_that_names_it(tmp_path, end):
    with pytest.raises(ConfigError, match=r"end\.py: (SystemExit|BaseException|NameError)"):
        load_config([write(tmp_path / "end.py", end)])


@pytest.mark.parametrize("key", ["out_dir", "init_from", "resume", "dataset"])
def test_the_home_folder_is_expanded_in_every_path(monkeypatch, key):
    monkeypatch.setenv("HOME", "/home/me")
    config, _ = load_config([f"--{key}=~/x"])
    assert getattr(config, key) == "/home/me/x"


@pytest.mark.parametrize(
    "argument",
    [
        *(
            "--out_dir=",
            "--dataset= ",
            "--resume=",
            "--out_dir=\udcff",
            "--n_embd=9223372036854775808",
        ),
        *("--batch_size=9223372036854775808", "--max_steps=100000000", "--timeout_s=1e18"),
        *("--loader_workers=100000", "--exclude=a,,b", "--include=,"),
    ],
)
def test_a_value_that_no_run_can_use_is_refused_by_name(argument):
    with pytest.raises(ConfigError, match=f"^{argument[2:].split('=')[0]}="):
        load_config([argument])


@pytest.mark.parametrize(
    ("extra", "is_refused"),
    [
        ([], True),
        (["--include=transformer.wte.weight"], True),
        (["--include=lm_head, transformer.*.weight"], True),
        (["--tie_weights=false"], False),
        (["--exclude=transformer.wte"], False),
        (["--exclude=transformer.wte.weight"], False),
        (["--include=transformer.wpe.weight"], False),
    ],
)
def test_dopr_on_an_embedding_that_is_also_the_head_is_refused(extra, is_refused):
    arguments = ["--dopr=true", "--embeddings=true", *extra]
    if not is_refused:
        load_config(arguments)
        return
    with pytest.raises(ConfigError, match="tie_weights=false"):
        load_config(arguments)


@pytest.mark.parametrize("gamma", ["0", "9.9e-5"])
def test_a_gamma_too_small_for_float32_is_refused_with_dopr_only(tmp_path, gamma):
    preset = write(tmp_path / "preset.py", f"gamma = {gamma}; dopr = True")
    with pytest.raises(ConfigError, match=r"gamma=.*float64"):
        load_config([preset])
    load_config([preset, "--dopr=false"])
    load_config([preset, "--gamma=1e-4"])


@pytest.mark.parametrize("typed", ["--gamma=0.3", "--refresh_every=10", "--exclude=lm_head"])
def test_a_typed_setting_of_dopr_without_dopr_is_refused(typed):
    with pytest.raises(ConfigError, match=f"{typed[2:]}: has no effect.*--dopr=true"):
        load_config([typed])
    with pytest.raises(ConfigError, match="add --dopr=true"):
        load_config(["config/demo.py", "--dopr=false", typed])
    load_config([typed, "--dopr=true"])
    load_config(["config/demo.py", "--dopr=false"])


@pytest.mark.parametrize("key", ["seed", "max_steps"])
def test_a_whole_number_is_parsed_exactly(key):
    with pytest.raises(ConfigError, match=f"{key}=9007199254740993:"):
        load_config([f"--{key}=9007199254740993"])


@pytest.mark.parametrize("argument", ["-lr=3", "lr=3"])
def test_a_setting_without_its_dashes_is_answered_with_what_to_write(argument):
    with pytest.raises(ConfigError, match=r"write --lr=3$"):
        load_config([argument])


def test_help_is_printed_in_any_locale_and_to_a_closed_pipe():
    environment = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    command = [sys.executable, "train.py", "--help"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert "--gamma=" in done.stdout
    read, write_end = os.pipe()
    os.close(read)
    done = subprocess.run(command, stdout=write_end, stderr=subprocess.PIPE, text=True, check=True)
    os.close(write_end)
    assert done.stderr == ""
