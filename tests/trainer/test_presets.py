"""What a later source of settings makes moot is adjusted; names of nanoGPT are answered."""

from pathlib import Path

import pytest

from optim.dopr.settings import settings_problems
from trainer.config import load_config
from trainer.optimizers import optimizer_problems
from trainer.settings import ConfigError


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
