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
from studies.mup import coord_check, width_sweep
from studies.mup.grid import grid
from studies.mup.update_ratio import measure_update
from studies.sweep.compare import parse, study_of
from tests.tiny import argv
from trainer.config import load_config
from trainer.parallel import FROM_TORCHRUN, parallel_problems

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
SLURM = ROOT / "config/two_nodes.sbatch"


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
    targets |= set(re.findall(r"`make ([\w-]+)`", README))
    assert {"demo", "test", "kernel-report", "bench-gpu"} <= targets
    assert all(f"\n{target}:" in makefile for target in targets)


def test_every_training_command_is_accepted(tmp_path):
    found = commands("python train.py")
    assert len(found) >= 3
    (tmp_path / "mine.py").write_text("seed = 1\n")
    for command in found:
        mine = [word.replace("config/mine.py", f"{tmp_path}/mine.py") for word in command[2:]]
        with pytest.raises(SystemExit) if "--help" in mine else nullcontext():
            load_config(mine)


def test_every_command_of_several_processes_is_accepted_by_so_many(monkeypatch):
    found = [shlex.split(SLURM.read_text().partition("torchrun ")[2].replace("\\\n", ""))]
    found += [command[1:] for command in commands("torchrun")]
    assert len(found) >= 4
    for command in found:
        given, _, arguments = " ".join(command).partition("train.py ")
        n_nodes = 2 if "nnodes" in given else 1
        size = n_nodes * int(re.findall(r"--nproc_per_node=(\d+)", given)[0])
        for key, value in {"WORLD_SIZE": str(size), **dict.fromkeys(FROM_TORCHRUN, "0")}.items():
            monkeypatch.setenv(key, value)
        load_config(arguments.removesuffix(" $@").split(), parallel_problems)


def test_every_ready_config_is_in_the_table():
    names = {path.name for path in (ROOT / "config").glob("*.py")}
    assert names == set(re.findall(r"`(\w+\.py)`", README.partition("| config |")[2])) & names
    assert names <= set(re.findall(r"`(\w+\.py)`", README))


def test_every_data_command_exists():
    found = {command[2] for command in commands("python -m data.")}
    assert {"data.text.prepare", "data.verify", "data.adopt"} <= found
    for module in found - {"data.NAME.prepare"}:
        assert "usage: python -m" in run(["python", "-m", module, "--help"]).stdout


TASK = "task:pdfa,states=4,alphabet=4,horizon=16,n_documents=64"


@pytest.fixture(scope="module")
def places(dataset, tmp_path_factory):
    """What the README's commands name, in small: runs on text and on a task, prompts."""
    folder = tmp_path_factory.mktemp("readme")
    for name, data in (("text", dataset), ("ctrl", TASK)):
        assert train.main(argv(data, folder / name)) == 0
    (folder / "prompts.txt").write_text("alpha\nbeta\n")
    names = {"out/demo/text": "text", "out/ctrl": "ctrl", "out/compare/ctrl-500": "ctrl"}
    names |= {name: name for name in ("prompts.txt", "samples.jsonl", "hf_model", "shards")}
    return {word: folder / name for word, name in names.items()}


def test_every_evaluation_command_runs_on_a_trained_model(places):
    found = commands("python -m eval.") + commands("python -m studies.")
    elsewhere = {"studies.sweep.compare", "eval.harness"}  # takes long; is an extra
    elsewhere |= {"studies.mup.coord_check", "studies.mup.width_sweep"}  # take long
    assert elsewhere | {"eval.rollout.ttf", "studies.report", "eval.sample"} <= {
        each[2] for each in found
    }
    for command in found:
        if command[2] not in elsewhere:
            more = ["--out", str(places["hf_model"])] if command[2] == "studies.report" else []
            run([*(str(places.get(word, word)) for word in command), *more])
    assert len(places["samples.jsonl"].read_text().splitlines()) == 2
    assert (places["hf_model"] / "config.json").exists()
    assert (places["hf_model"] / "report.html").exists()


def test_every_comparison_is_accepted():
    found = [
        command
        for command in commands("python -m eval.") + commands("python -m studies.")
        if command[2] == "studies.sweep.compare"
    ]
    assert found
    for command in found:
        assert study_of(parse(command[3:])[1]).variants


@pytest.mark.parametrize("study", [coord_check, width_sweep])
def test_every_width_study_is_accepted(study, tmp_path):
    name = study.__name__
    found = [
        command
        for command in commands("python -m eval.") + commands("python -m studies.")
        if command[2] == name
    ]
    assert found
    for command in found:
        _, arguments = study.parse([*command[3:], "--out", str(tmp_path)])
        assert grid(arguments, {}, measure_update)


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
