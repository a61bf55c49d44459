"""Start runs in several processes, and compare their weights."""

import contextlib
import io
from pathlib import Path

import train
from tests.processes import Gang
from tests.tiny import argv
from trainer.checkpoint.read import open_checkpoint
from trainer.checkpoint.sharded import read_all

# The vocabulary of 257 ids does not divide evenly among 3 or 4 processes, nor the width among 3.
# There are no biases, because the gradient of a key's bias is only rounding error, which AdamW
# would turn into a full step. For the same reason, its eps is larger than usual: it does that to a
# single gradient that is nearly zero.
SETTINGS = {"n_embd": 20, "bias": "false", "batch_size": 12, "micro_batch_size": 1, "max_steps": 5}
SETTINGS |= {"warmup_steps": 1, "grad_clip": 0.5, "log_every": 1}

OPTIMIZERS = {
    "adamw": {"lr": 3e-3, "eps": 1e-5},
    "muon": {"lr": 3e-3},
    "signum": {"lr": 1e-3},
    "adamuon": {"lr": 3e-3},
    "sgd": {"lr": 0.1},
}
DOPR = {
    "off": {},
    "exact": {"dopr": "true"},
    "fast": {"dopr": "true", "refresh_every": 3, "sigma_beta": 0.9, "token_stride": 2},
    "fresh mean": {"dopr": "true", "refresh_every": 3, "sigma_beta": 0.9, "fresh_mean": "true"},
}
PARALLEL = {
    "ddp": (2, {"parallel": "ddp"}),
    "fsdp": (3, {"parallel": "fsdp"}),
    "hsdp": (4, {"parallel": "hsdp", "shard_size": 2}),
}


def main(arguments: list[str]) -> tuple[int, str]:
    """Start a run in this process; return its exit code and standard error."""
    with contextlib.redirect_stderr(io.StringIO()) as errors:
        return train.main(arguments), errors.getvalue()


def run(gang: Gang, size: int, data: Path, out: Path, **changes: object) -> list[tuple[int, str]]:
    """Start a run in `size` processes, or in this process if `size` is 1."""
    arguments = argv(data, out, **SETTINGS | changes)
    return [main(arguments)] if size == 1 else gang.run(size, main, arguments)


def trained(gang: Gang, size: int, data: Path, out: Path, **changes: object) -> Path:
    """Start a run, assert that it succeeds, and return its folder."""
    results = run(gang, size, data, out, **changes)
    assert all(code == 0 for code, _ in results), results
    return out


def distance(one: Path, other: Path) -> float:
    """Return the largest difference of a weight between the newest checkpoints of two runs."""
    a, b = (read_all(open_checkpoint(out).model) for out in (one, other))
    return max((a[key] - b[key]).abs().max().item() for key in a.keys() | b.keys())
