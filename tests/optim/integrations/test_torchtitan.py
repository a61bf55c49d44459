"""The block of docs/integrations.md runs in torchtitan's trainer, and what the page says of it.

torchtitan 0.3.0 asks for an older datasets than requirements-dev.txt pins, so it is not installed
there. It works with the newer one:

    pip install torchdata spmd_types==0.2.3 torch_checkpointing tyro tensorboard einops
    pip install --no-deps torchtitan==0.3.0
"""

import json
import os
import random
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch.distributed import checkpoint

from optim import ActivationPreconditioner
from tests.optim.models import backward, mlp

LENGTH, BATCH = 32, 8


def on_torchtitan(test):
    """Mark a test that starts processes of torchtitan; in one worker, they share their runs."""
    is_missing = not find_spec("torchtitan")
    skips = pytest.mark.skipif(is_missing, reason="torchtitan is not installed")
    return skips(pytest.mark.slow(pytest.mark.xdist_group("torchtitan")(test)))


class Container(torch.optim.Optimizer):
    """Holds optimizers and steps them, as torchtitan's OptimizersContainer does."""

    def __init__(self, optimizers: list[torch.optim.Optimizer]) -> None:
        self.optimizers = optimizers
        params = [p for each in optimizers for g in each.param_groups for p in g["params"]]
        super().__init__(params, {})

    def step(self, closure=None) -> None:
        for optimizer in self.optimizers:
            optimizer.step()


def made():
    model = mlp()
    parts = [[model[0].weight, model[0].bias], [model[2].weight, model[2].bias]]
    container = Container([torch.optim.AdamW(part, lr=1e-2) for part in parts])
    preconditioner = ActivationPreconditioner(model, gamma=0.1, refresh_every=3)
    return model, container, preconditioner.attach(container)


def train(model, container, steps) -> None:
    for step in steps:
        backward(model, step)
        container.step()
        container.zero_grad()


@pytest.mark.filterwarnings("ignore")  # of torch: there is no process group
def test_a_distributed_checkpoint_restores_the_state_in_a_container(tmp_path):
    model, container, preconditioner = made()
    train(model, container, range(4))
    checkpoint.save({"dopr": preconditioner}, checkpoint_id=tmp_path)
    _, _, again = made()
    checkpoint.load({"dopr": again}, checkpoint_id=tmp_path)
    expected, found = preconditioner.state_dict(), again.state_dict()
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert {layer["step"] for layer in found.values()} == {4}


def write_files(folder: Path, n_steps: int = 8) -> None:
    """Write a tokenizer of words, and the same batches for one process and for two.

    A document is one sequence. torchtitan gives each process a contiguous part of the documents.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["<bos>", "<eos>", *(f"w{i}" for i in range(60))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, "<eos>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))
    special = {"bos_token": "<bos>", "eos_token": "<eos>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(special))
    rng = random.Random(0)
    texts = [" ".join(rng.choices(words[2:], k=LENGTH - 1)) for _ in range(n_steps * BATCH)]
    for size in (1, 2):
        local = BATCH // size
        starts = [step * BATCH + rank * local for rank in range(size) for step in range(n_steps)]
        lines = [json.dumps({"text": text}) for i in starts for text in texts[i : i + local]]
        (folder / f"data{size}").mkdir()
        (folder / f"data{size}" / "data.json").write_text("\n".join(lines))


class Titan:
    """Runs torchtitan; each run has a folder for its checkpoints."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        write_files(folder)

    def run(self, name: str, *args: str, size: int = 1) -> dict:
        """Return the losses and the summary of a run in `size` processes."""
        results = self.folder / f"{name}.json"
        settings = {
            "module": "tests.optim.integrations.titan_config",
            "config": "tiny",
            "dump_folder": self.folder / name,
            "hf_assets_path": self.folder,
            "dataloader.dataset_path": self.folder / f"data{size}",
            "training.seq_len": LENGTH,
            "training.global_batch_size": BATCH,
            "training.local_batch_size": BATCH // 2,  # a single process accumulates gradients
        }
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={size}"]
        program = ["-m", "tests.optim.integrations.titan_trainer", str(results)]
        options = [f"--{key}={value}" for key, value in settings.items()]
        done = subprocess.run(
            [sys.executable, *torchrun, *program, *options, *args],
            env=os.environ | {"HF_HOME": str(self.folder / "cache")},
            capture_output=True,
            text=True,
            timeout=500,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return json.loads(results.read_text())

    def run_from_step_3(self, name: str, *args: str, size: int = 1) -> list[float]:
        """Return the losses of a run that begins with the weights of `whole` after step 3."""
        start = f"--checkpoint.initial_load_path={self.folder}/whole/checkpoint/step-3"
        return self.run(name, start, *args, size=size)["losses"]


@pytest.fixture(scope="module")
def titan(tmp_path_factory):
    return Titan(tmp_path_factory.mktemp("titan"))


@pytest.fixture(scope="module")
def whole(titan):
    """Six steps in one process, with checkpoints after 3 and 6."""
    return titan.run("whole")


@pytest.fixture(scope="module")
def one_process(titan, whole):
    return titan.run_from_step_3("one")


@on_torchtitan
def test_the_linear_layers_are_covered(whole):
    covers, *others = whole["summary"].splitlines()
    assert covers.startswith("DoPr covers 10 weights")
    assert "steps: 6, refreshes: 1" in covers
    assert [line.split()[2] for line in others] == ["tok_embeddings.weight", "lm_head.weight"]


@on_torchtitan
def test_a_resumed_run_has_the_same_losses(titan, whole):
    resumed = titan.run("whole", "--checkpoint.load_step=3")
    assert "steps: 6, refreshes: 1" in resumed["summary"]
    assert resumed["losses"] == whole["losses"][3:]


@on_torchtitan
def test_two_processes_have_the_losses_of_one(titan, one_process):
    assert titan.run_from_step_3("two", size=2) == pytest.approx(one_process, rel=1e-5)


@on_torchtitan
def test_compiled_blocks_have_the_losses_of_eager_ones(titan, one_process):
    compiled = titan.run_from_step_3("compiled", "--compile.enable")
    assert compiled == pytest.approx(one_process, rel=1e-5)
