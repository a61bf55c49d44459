"""The README tells the truth: its commands run and its code works."""

import re
import shlex
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

import train
from configurator import load_config
from tests.tiny import argv

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.S)


def commands(start: str) -> list[list[str]]:
    """The shell commands of the README that begin with these words, comments removed."""
    lines = [line for block in blocks("sh") for line in block.splitlines()]
    lines += re.findall(r"`(python -m [^`]+)`", README)
    return [shlex.split(line, comments=True) for line in lines if line.startswith(start)]


def run(command: list[str], cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    arguments = [sys.executable, *command[1:]]
    return subprocess.run(arguments, cwd=cwd, capture_output=True, text=True, check=True)


def test_every_make_target_exists():
    makefile = (ROOT / "Makefile").read_text()
    targets = {command[1] for command in commands("make")}
    assert {"demo", "test"} <= targets
    assert all(f"\n{target}:" in makefile for target in targets)


def test_every_training_command_is_accepted(tmp_path):
    found = commands("python train.py")
    assert len(found) >= 3
    (tmp_path / "mine.py").write_text("seed = 1\n")
    for command in found:
        mine = [word.replace("config/mine.py", f"{tmp_path}/mine.py") for word in command[2:]]
        with pytest.raises(SystemExit) if "--help" in mine else nullcontext():
            load_config(mine)


def test_every_ready_config_is_in_the_table():
    names = {path.name for path in (ROOT / "config").glob("*.py")}
    assert names == set(re.findall(r"`(\w+\.py)`", README.partition("| config |")[2])) & names
    assert names <= set(re.findall(r"`(\w+\.py)`", README))


def test_every_data_command_exists():
    found = {command[2] for command in commands("python -m data.")}
    assert {"data.text.prepare", "data.verify", "data.adopt"} <= found
    for module in found - {"data.NAME.prepare"}:
        assert "usage: python -m" in run(["python", "-m", module, "--help"]).stdout


@pytest.fixture(scope="module")
def trained(dataset, tmp_path_factory):
    out = tmp_path_factory.mktemp("readme") / "run"
    assert train.main(argv(dataset, out)) == 0
    return out


def test_every_evaluation_command_runs_on_a_trained_model(trained, tmp_path):
    (tmp_path / "prompts.txt").write_text("alpha\nbeta\n")
    found = commands("python -m eval.")
    assert len(found) >= 3
    for command in found:
        places = {"out/demo": trained, "out/demo_base": trained, "hf_model": tmp_path / "hf_model"}
        places |= {name: tmp_path / name for name in ("prompts.txt", "samples.jsonl")}
        run([str(places.get(word, word)) for word in command])
    assert len((tmp_path / "samples.jsonl").read_text().splitlines()) == 2
    assert (tmp_path / "hf_model" / "config.json").exists()


def test_the_snippet_turns_a_strangers_adamw_into_dopr():
    (snippet,) = blocks("python")
    names = {"torch": torch, "model": torch.nn.Sequential(torch.nn.Linear(4, 3))}
    names["model"].add_module("lm_head", torch.nn.Linear(3, 2))
    exec(snippet, names)
    names["model"](torch.randn(8, 4)).square().sum().backward()
    plain = names["model"][0].weight.grad.clone()
    names["optimizer"].step()
    assert not torch.allclose(plain, names["model"][0].weight.grad)  # M, not G
    covered = {row["name"]: row["covered"] for row in names["preconditioner"].report()}
    assert covered == {"0.weight": True, "lm_head.weight": False}
