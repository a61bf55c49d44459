"""What a later source of settings makes moot is adjusted; names of nanoGPT are answered."""

from dataclasses import asdict
from pathlib import Path

import pytest

from eval.rollout.record import train_command
from optim.build import OPTIMIZERS, build_optimizers
from optim.dopr.settings import settings_problems
from tests.tiny_gpt import gpt
from trainer.config import load_config
from trainer.optimizers import optimizer_problems
from trainer.presets import READERS
from trainer.settings import FIELDS, ConfigError


def write(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


ADJUSTED = [  # settings of a preset, what the user types, what becomes of it
    ("max_steps = 300; warmup_steps = 30", "--max_steps=20", {"warmup_steps": 2}),
    ("", "--max_steps=20", {"warmup_steps": 2}),
    ("optimizer = 'muon'; aux_lr = 1e-3", "--optimizer=adamw", {"aux_lr": None}),
    (
        "optimizer = 'lion'; optimizer_args = 'foreach=true'",
        "--optimizer=adamw",
        {"optimizer_args": ""},
    ),
    ("batch_size = 16; micro_batch_size = 16", "--batch_size=12", {"micro_batch_size": 12}),
    (
        "dopr = True; refresh_every = 10; collect_every = 10",
        "--refresh_every=4",
        {"collect_every": 2},
    ),
    ("mup = True; wd_scaling = 'sqrt'", "--mup=false", {"wd_scaling": "independent"}),
    ("parallel = 'hsdp'; shard_size = 2", "--parallel=ddp", {"shard_size": None}),
]


@pytest.mark.parametrize(("preset", "typed", "expected"), ADJUSTED)
def test_what_a_preset_sets_and_the_command_line_makes_moot_is_adjusted(
    tmp_path, capsys, preset, typed, expected
):
    config, origins = load_config([write(tmp_path / "preset.py", preset), typed])
    ((key, value),) = expected.items()
    assert getattr(config, key) == value
    assert origins[key] == "adjusted"
    assert capsys.readouterr().out.count(f"note: {key}=") == 1


def problems(settings):
    return settings_problems(settings) + optimizer_problems(settings)


@pytest.mark.parametrize(("preset", "typed", "expected"), ADJUSTED[2:])
def test_what_contradicts_itself_in_one_source_is_refused(tmp_path, preset, typed, expected):
    both = [f"--{each.strip()}".replace(" = ", "=").replace("'", "") for each in preset.split(";")]
    key = typed.removeprefix("--").split("=")[0]
    kept = [each for each in both if not each.startswith(f"--{key}=")]
    with pytest.raises(ConfigError, match=next(iter(expected))):
        load_config([*kept, typed], problems)


def test_a_typed_warmup_that_is_too_long_is_refused(tmp_path):
    preset = write(tmp_path / "preset.py", "max_steps = 20")
    with pytest.raises(ConfigError, match="warmup_steps=30: must be below max_steps=20"):
        load_config([preset, "--warmup_steps=30"])


@pytest.mark.parametrize("path", sorted(Path("config").glob("*.py")), ids=lambda path: path.name)
@pytest.mark.parametrize("typed", ["--max_steps=5", "--optimizer=adamw", "--optimizer=sgd"])
def test_every_preset_can_be_tried_quickly(path, typed):
    load_config([str(path), typed], problems)


MOOT = [  # what the user types, and what is wrong with it
    ("--optimizer=nadam --ns_dtype=float32", "ns_dtype=float32: .*optimizer=nadam.*optimizer_args"),
    ("--optimizer=torch:muon --adjust_lr=original", "adjust_lr=original: .*optimizer_args"),
    (
        "--optimizer=signum --beta1=0.95",
        "beta1=0.95: .*signum.*for adamw, muon, adamuon",
    ),
    ("--optimizer=adamuon --adjust_lr=original", "adjust_lr=original: has no effect on optimizer="),
    ("--optimizer=sgd --nesterov=true", "nesterov=True: has no effect"),
    ("--momentum=0.9", "momentum=0.9: has no effect on optimizer=adamw"),
    ("--ttf_episodes=64", "ttf_episodes=64: has no effect without ttf_every"),
    ("--schedule=constant --min_lr_ratio=0.5", "min_lr_ratio=0.5: .*schedule=constant"),
    ("--wandb_project=x", "wandb_project=x: has no effect without wandb"),
    ("--allow_tokenizer_mismatch=true", "allow_tokenizer_mismatch=True: .*without init_from"),
]


@pytest.mark.parametrize(("typed", "message"), MOOT)
def test_a_typed_setting_without_effect_is_refused_but_not_one_of_a_preset(
    tmp_path, typed, message
):
    *others, moot = typed.split()
    with pytest.raises(ConfigError, match=message):
        load_config([*others, moot])
    key, value = moot.removeprefix("--").split("=")
    value = value.title() if value == "true" else repr(value)
    load_config([write(tmp_path / "preset.py", f"{key} = {value}"), *others])


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_table_names_the_optimizers_that_read_a_setting(optimizer):
    def built(**changes):
        settings = {key: FIELDS[key].default for key in READERS} | {"lr": 1.0, "weight_decay": 0.0}
        groups = build_optimizers(gpt(), optimizer=optimizer, **settings | changes)
        return repr([each.defaults for each in groups])

    other = {"ns_dtype": "float32", "ns_coefficients": "quintic", "adjust_lr": "original"}
    for key, readers in READERS.items():
        value = other.get(key) or FIELDS[key].default / 2
        assert (built(**{key: value}) != built()) == (optimizer in readers)


def test_the_recorded_command_leaves_out_what_has_no_effect(tmp_path):
    preset = write(tmp_path / "preset.py", "momentum = 0.5; gamma = 0.3; eps = 1e-6")
    config, _ = load_config([preset])
    command = train_command(asdict(config) | {"ns_steps": 5}, 1)
    assert command.endswith("train.py --eps=1e-06 --out_dir=NEW")
    load_config(command.split()[3:])


NANOGPT = """
import time
learning_rate = 6e-4; min_lr = 6e-5; max_iters = 100; batch_size = 12; eval_iters = 200
gradient_accumulation_steps = 40; decay_lr = True; always_save_checkpoint = False; wandb_log = True
"""


def test_a_config_of_nanogpt_is_answered_with_names_and_arithmetic(tmp_path):
    with pytest.raises(ConfigError) as caught:
        load_config([write(tmp_path / "nanogpt.py", NANOGPT)])
    text = str(caught.value)
    for part in (
        *("learning_rate is called lr", "max_iters is called max_steps", "schedule=cosine"),
        *("min_lr_ratio = min_lr / lr = 0.1", "gradient_accumulation_steps = 480"),
        *("eval_iters / gradient_accumulation_steps = 5", "wandb=online", "save_every"),
    ):
        assert part in text
    assert "'time'" not in text
