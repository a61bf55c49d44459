"""Training in several processes, for tests: what runs in each of them, and what is compared."""

import contextlib
import io
from pathlib import Path

import train
from tests.processes import Gang
from tests.tiny import argv
from trainer.checkpoint.read import open_checkpoint

# Sizes that 3 and 4 processes cannot share evenly; fp32 where bf16 would hide differences. Without
# biases: the gradient of a key's bias is zero but for rounding, which AdamW makes a step of.
SETTINGS = {"n_embd": 20, "bias": "false", "batch_size": 12, "micro_batch_size": 1, "max_steps": 5}
SETTINGS |= {"warmup_steps": 1, "grad_clip": 0.5, "ns_dtype": "float32", "log_every": 1}

OPTIMIZERS = {
    "adamw": {"lr": 3e-3},
    "muon": {"lr": 3e-3},
    "signum": {"lr": 1e-3},
    "adamuon": {"lr": 3e-3},
    "sgd": {"lr": 0.1},
}
DOPR = {
    "off": {},
    "exact": {"dopr": "true"},
    "fast": {"dopr": "true", "refresh_every": 3, "sigma_beta": 0.9, "token_stride": 2},
}
PARALLEL = {
    "ddp": (2, {"parallel": "ddp"}),
    "fsdp": (3, {"parallel": "fsdp"}),
    "hsdp": (4, {"parallel": "hsdp", "shard_size": 2}),
}


def main(arguments: list[str]) -> tuple[int, str]:
    """Exit code and standard error of a run."""
    with contextlib.redirect_stderr(io.StringIO()) as errors:
        return train.main(arguments), errors.getvalue()


def run(gang: Gang, size: int, data: Path, out: Path, **changes: object) -> list[tuple[int, str]]:
    """A run in `size` processes; of one, in this process."""
    arguments = argv(data, out, **SETTINGS | changes)
    return [main(arguments)] if size == 1 else gang.run(size, main, arguments)


def trained(gang: Gang, size: int, data: Path, out: Path, **changes: object) -> Path:
    """The folder of a run that went well."""
    results = run(gang, size, data, out, **changes)
    assert all(code == 0 for code, _ in results), results
    return out


def distance(one: Path, other: Path) -> float:
    """The largest difference of a weight between the newest checkpoints of two runs."""
    a, b = open_checkpoint(one).model, open_checkpoint(other).model
    return max((a[key] - b[key]).abs().max().item() for key in a.keys() | b.keys())
