"""A checkpoint that was changed and signed again is refused with one error, or changes nothing."""

import json
import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import train
from data.tokenizer import byte_tokenizer
from eval.run import run_of
from tests.tiny import argv
from tests.trainer.tiny_checkpoint import change_manifest, change_train
from trainer.build import make_model, make_optimizers, make_preconditioner
from trainer.checkpoint import sharded
from trainer.checkpoint.read import Checkpoint, CheckpointError, load_checkpoint
from trainer.checkpoint.resume import check_same_function
from trainer.checkpoint.state import TrainState
from trainer.config import load_config
from trainer.metrics import MetricsLog
from trainer.settings import ConfigError

pytestmark = pytest.mark.xdist_group("mutations")  # its fixtures are slow

RUN = {"n_layer": 1, "n_embd": 8, "block_size": 4, "max_steps": 2, "warmup_steps": 1}
RUN |= {"optimizer": "muon", "dopr": True, "bias": False, "eval_every": 9, "eval_batches": 1}
N = [100, pytest.param(3000, marks=pytest.mark.slow)]  # examples of each test
DEEP = json.loads("[" * 150 + "]" * 150)
ODD = [None, True, -1, 2**70, 1.5, "x", "", [], {}, [1], {"x": 1}, DEEP, float("nan")]


class Case:
    """A run's checkpoint, and the state that resumes from copies of it."""

    def __init__(self, dataset: Path, out: Path, form: str) -> None:
        arguments = argv(dataset, out, **RUN, checkpoint_format=form)
        assert train.main(arguments) == 0
        self.slowness = {"full": 1, "sharded": 10}[form]
        self.original = out / "checkpoints/step-00000002"
        self.path = out / "copy/step-00000002"
        config, _ = load_config(arguments)
        self.model = make_model(config, byte_tokenizer().n_vocab)
        optimizers = make_optimizers(config, self.model, None)
        preconditioner = make_preconditioner(config, self.model).attach(*optimizers)
        self.state = TrainState(self.model, optimizers, preconditioner)
        self.refresh()
        self.expected = self.weights_after_a_step()

    def refresh(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)
        shutil.copytree(self.original, self.path)

    def load(self) -> Checkpoint:
        found = load_checkpoint(self.path)
        check_same_function(found, asdict(self.model.config))
        self.state.restore(found)
        return found

    def weights_after_a_step(self) -> list[torch.Tensor]:
        """Resume, load the model for sampling, take a step, and return the weights."""
        run_of(self.load())
        idx = torch.arange(8).view(2, 4)
        with torch.random.fork_rng():
            self.model(idx, idx)[1].backward()
        for optimizer in self.state.optimizers:
            optimizer.step()
        self.model.zero_grad()
        return [parameter.detach().clone() for parameter in self.model.parameters()]

    def check(self) -> None:
        """Assert that the copy is refused, or gives the weights that the original gives."""
        try:
            found = self.weights_after_a_step()
        except (CheckpointError, ConfigError):
            return
        assert all(map(torch.equal, found, self.expected))


@pytest.fixture(scope="module", params=["full", "sharded"])
def case(request, dataset, tmp_path_factory):
    return Case(dataset, tmp_path_factory.mktemp(request.param) / "run", request.param)


def examples(n: int, check: Callable[[random.Random], None]) -> None:
    """Call `check` with n sources of random choices."""
    quiet = settings(max_examples=n, database=None, suppress_health_check=list(HealthCheck))
    quiet(given(st.randoms(use_true_random=False))(check))()


def places(tree: Any) -> Iterator[tuple[Any, Any]]:
    """Yield (container, key) of every value in nested dicts and lists."""
    keyed = tree.items() if isinstance(tree, dict) else enumerate(tree)
    for key, value in list(keyed):
        yield tree, key
        if isinstance(value, (dict, list)):
            yield from places(value)


def change_json(tree: Any, rng: random.Random) -> None:
    """Remove, replace, rename or add one value."""
    container, key = rng.choice([*places(tree)])
    how = rng.choice(["remove", "replace", "rename", "add"])
    value = rng.choice(ODD)
    if how == "remove":
        del container[key]
    elif how == "replace" or isinstance(container, list):
        container[key] = value
    elif how == "rename":
        container[rng.choice(["x", "..", "step", f"{key}x"])] = container.pop(key)
    else:
        container["x"] = value


@pytest.mark.parametrize("n", N)
def test_a_changed_manifest(case, n):
    def check(rng):
        case.refresh()
        change_manifest(case.path, lambda manifest: change_json(manifest, rng))
        case.check()

    examples(n // case.slowness, check)


def odd_tensors(tensor: torch.Tensor) -> list[Any]:
    """Return tensors that cannot stand for this one, and one that can."""
    wrong = [torch.zeros(3), torch.zeros(0), tensor.to(torch.float64), tensor.to(torch.bfloat16)]
    wrong += [tensor.to(torch.complex64), tensor.to("meta"), tensor[None], tensor.bool()]
    if tensor.is_floating_point():
        wrong += [tensor * torch.nan, tensor.int()]
    if tensor.dim() == 2:
        wrong += [tensor.to_sparse(), tensor.T.contiguous().T]
        if tensor.shape[0] != tensor.shape[1]:
            wrong.append(tensor.T.contiguous())
    return wrong


def change_tree(tree: dict[str, Any], rng: random.Random) -> None:
    """Remove, replace or add one value; replace a tensor by one that cannot stand for it."""
    container, key = rng.choice([*places(tree)])
    value = container[key]
    if isinstance(value, torch.Tensor) and rng.random() < 0.8 and key not in ("gram", "norm_ratio"):
        container[key] = rng.choice(odd_tensors(value))
    elif rng.random() < 0.3:
        del container[key]
    elif rng.random() < 0.2 and isinstance(container, dict):
        container[rng.choice(["x", 99, -1, None])] = value
    else:
        container[key] = rng.choice(ODD)


@pytest.mark.parametrize("n", N)
@pytest.mark.filterwarnings("ignore:Sparse")
@pytest.mark.filterwarnings("ignore:Casting complex")
def test_a_changed_train_pt(case, n):
    def check(rng):
        case.refresh()
        change_train(case.path, lambda tree: change_tree(tree, rng))
        case.check()

    examples(n // case.slowness, check)


@pytest.mark.parametrize("n", N)
def test_changed_bytes(case, n):
    """The values of tensors may change, so only errors are compared."""

    def check(rng):
        case.refresh()
        names = sorted(path for path in case.path.rglob("*") if path.is_file())
        path = rng.choice([each for each in names if each.name != "manifest.json"])
        content = bytearray(path.read_bytes())
        for _ in range(rng.choice([1, 4])):
            content[rng.randrange(min(len(content), rng.choice([64, 2**30])))] = rng.randrange(256)
        path.write_bytes(content[: rng.choice([len(content), rng.randrange(len(content))])])
        change_manifest(case.path, lambda manifest: None)
        try:
            case.load()
        except (CheckpointError, ConfigError):
            return

    examples(n // case.slowness, check)


@pytest.mark.parametrize("n", N)
def test_a_changed_metrics_jsonl(tmp_path, n):
    """Damaged lines are removed, and the others are kept."""
    lines = [f'{{"kind": "train", "step": {step}, "loss": 1.5}}\n'.encode() for step in range(9)]
    path = tmp_path / "metrics.jsonl"

    def check(rng):
        content = bytearray(b"".join(lines))
        for _ in range(3):
            content[rng.randrange(len(content))] = rng.randrange(256)
        path.write_bytes(content)
        MetricsLog(tmp_path, 20, 20).close()
        kept = path.read_bytes().splitlines(keepends=True)
        assert len({*lines} & {*kept}) >= len(lines) - 6
        assert all(isinstance(json.loads(line)["step"], int) for line in kept)

    examples(n, check)


def test_an_optimizer_tensor_of_another_shape_is_an_error_that_names_it(case):
    def shrink(tree):
        tree.get("train", tree)["optimizers"][1][0]["exp_avg"] = torch.zeros(3)

    case.refresh()
    change_train(case.path, shrink)
    with pytest.raises(CheckpointError, match=r"AdamW: exp_avg of parameter 0 is \(3,\)"):
        case.load()


@pytest.mark.parametrize("case", ["sharded"], indirect=True)
def test_an_index_whose_rows_are_not_in_the_files_is_refused(case, monkeypatch):
    shape = sharded._unpickled(case.original / "shards")
    next(iter(shape.state_dict_metadata.values())).size = torch.Size([2**40, 8])
    monkeypatch.setattr(sharded, "_unpickled", lambda folder: shape)
    case.refresh()
    with pytest.raises(CheckpointError, match="are not in the files"):
        case.load()
