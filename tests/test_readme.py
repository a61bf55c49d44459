"""The commands in the README and in docs/ run, its code works, and it stays short."""

import importlib
import importlib.util
import re
import shlex
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

import optim
import train
from studies.mup import coord_check, width_sweep
from studies.mup.grid import grid
from studies.mup.update_ratio import measure_update
from studies.sweep.compare import parse, study_of
from tests.tiny import argv
from trainer.config import load_config
from trainer.parallel import FROM_TORCHRUN, parallel_problems

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
DOCS = [path.read_text() for path in sorted((ROOT / "docs").glob("*.md"))]
SLURM = ROOT / "config/two_nodes.sbatch"
TASK = "task:pdfa,states=4,alphabet=4,horizon=16,n_documents=64"
OURS = r"(?:eval|studies|data|bench)[\w.]*"


def blocks(language: str, text: str = README) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, re.S)


def commands(start: str, texts: tuple[str, ...] = (README,)) -> list[list[str]]:
    """The shell commands that begin with these words, without their comments."""
    lines = []
    for text in texts:
        lines += [line for block in blocks("sh", text) for line in block.splitlines()]
        lines += re.findall(r"`(python -m [^`]+)`", text)
    return [shlex.split(line, comments=True) for line in lines if line.startswith(start)]


def run(command: list[str], cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    arguments = [sys.executable, *command[1:]]
    return subprocess.run(arguments, cwd=cwd, capture_output=True, text=True, check=True)


def test_the_readme_has_at_most_1300_words():
    assert len(README.split()) <= 1300


def test_the_readme_shows_what_the_demo_prints():
    (folders,) = re.findall(r"^DEMO\s*:= (.*)$", (ROOT / "Makefile").read_text(), re.M)
    assert re.findall(r"^(out/demo/\w+)  ", README, re.M) == folders.split()


def test_every_link_leads_to_a_file():
    for path in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md"), ROOT / "CHANGELOG.md"]:
        for link in re.findall(r"\]\((?!https?:|#)([^)#\s]+)", path.read_text()):
            assert (path.parent / link).exists(), f"{path}: {link}"


def test_every_make_target_exists():
    makefile = (ROOT / "Makefile").read_text()
    targets = {command[1] for text in [README, *DOCS] for command in commands("make", (text,))}
    targets |= {name for text in [README, *DOCS] for name in re.findall(r"`make ([\w-]+)`", text)}
    assert {"demo", "test"} <= targets
    assert all(f"\n{target}:" in makefile for target in targets)


def test_every_training_command_is_accepted():
    found = commands("python train.py")
    assert len(found) >= 3
    for command in found:
        words = command[2:]
        with pytest.raises(SystemExit) if "--help" in words else nullcontext():
            load_config(words)


def test_every_command_of_several_processes_is_accepted_by_so_many(monkeypatch):
    found = [shlex.split(SLURM.read_text().partition("torchrun ")[2].replace("\\\n", ""))]
    found += [command[1:] for command in commands("torchrun", (README, *DOCS))]
    assert len(found) >= 4
    for command in found:
        given, _, arguments = " ".join(command).partition("train.py ")
        n_nodes = 2 if "nnodes" in given else 1
        size = n_nodes * int(re.findall(r"--nproc_per_node=(\d+)", given)[0])
        for key, value in {"WORLD_SIZE": str(size), **dict.fromkeys(FROM_TORCHRUN, "0")}.items():
            monkeypatch.setenv(key, value)
        load_config(arguments.removesuffix(" $@").split(), parallel_problems)


def test_every_preset_is_named():
    for path in (ROOT / "config").glob("*.py"):
        assert f"`{path.name}`" in README


def test_every_module_that_is_named_exists():
    for text in [README, *DOCS]:
        for module in set(re.findall(rf"python -m ({OURS})", text)) - {"data.NAME.prepare"}:
            assert importlib.util.find_spec(module.rstrip(".")), module


@pytest.fixture(scope="module")
def places(dataset, tmp_path_factory):
    """Small stand-ins for what the README's commands name."""
    folder = tmp_path_factory.mktemp("readme")
    for name, data in (("text", dataset), ("task", TASK)):
        assert train.main(argv(data, folder / name)) == 0
    return {"out/demo/text": folder / "text", "hf_model": folder / "hf_model"}


def test_every_evaluation_command_runs_on_a_trained_model(places, monkeypatch):
    monkeypatch.chdir(ROOT)
    found = [each for each in commands("python -m eval.") if len(each) > 3]
    assert {"eval.rollout.ttf", "eval.summary", "eval.sample", "eval.hf"} == {
        each[2] for each in found
    }
    for command in found:
        words = [str(places.get(word, word)) for word in command]
        if command[2] == "eval.rollout.ttf":  # the text is too short to hold a rollout
            words[3] = str(places["out/demo/text"].with_name("task"))
        if command[2] == "eval.sample":
            run(words)  # in a process, as a reader does
        else:
            importlib.import_module(command[2]).main(words[3:])
    assert (places["hf_model"] / "config.json").exists()


def test_every_comparison_is_accepted():
    found = commands("python -m studies.sweep.compare", (README, *DOCS))
    found = [command for command in found if len(command) > 3]
    assert len(found) >= 2
    for command in found:
        assert study_of(parse(command[3:])[1]).variants


@pytest.mark.parametrize("study", [coord_check, width_sweep])
def test_every_width_study_is_accepted(study, tmp_path):
    found = commands(f"python -m {study.__name__} ", tuple(DOCS))
    assert found
    for command in found:
        _, arguments = study.parse([*command[3:], "--out", str(tmp_path)])
        assert grid(arguments, {}, measure_update)


def test_the_snippet_puts_dopr_in_front_of_an_optimizer(monkeypatch):
    (snippet,) = blocks("python")
    monkeypatch.setitem(sys.modules, "dopr", optim)  # what `pip install .` calls it
    names = {"torch": torch, "model": torch.nn.Sequential(torch.nn.Linear(4, 3))}
    exec(snippet, names)
    names["model"](torch.randn(8, 4)).square().sum().backward()
    G = names["model"][0].weight.grad.clone()
    names["optimizer"].step()
    assert not torch.allclose(G, names["model"][0].weight.grad)  # it is M now
