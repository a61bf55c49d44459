"""What does DoPr add to a step? Step time of an optimizer and its DoPr versions, run alternately.

    python -m bench.step_overhead [--widths 128 256 512] [--rounds 12] [--out FILE]

One process, one GPT per variant with the same weights and the same batch; in every round each
variant takes `refresh_every` steps, so that a round of the fast mode holds exactly one refresh.
Reported: median over rounds of the mean step time, and its ratio to the base's.
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from model import GPT, GPTConfig
from optim import ActivationPreconditioner
from optim.build import build_optimizers

REFRESH_EVERY = 10
N_LAYER, BLOCK_SIZE, BATCH_SIZE, VOCAB_SIZE = 4, 128, 32, 2048  # 4,096 tokens, as in the demo
MODES: dict[str, dict[str, Any] | None] = {
    "base": None,
    "exact": {"gamma": 0.1},
    "fast": {
        **{"gamma": 0.1, "sigma_beta": 0.95, "refresh_every": REFRESH_EVERY},
        **{"collect_every": REFRESH_EVERY, "token_stride": 4},
    },
}


def make_step(width: int, optimizer: str, mode: str) -> Callable[[], None]:
    """A training step of a fresh GPT."""
    torch.manual_seed(0)
    shape = {"n_layer": N_LAYER, "n_head": width // 32, "n_embd": width, "block_size": BLOCK_SIZE}
    model = GPT(GPTConfig(vocab_size=VOCAB_SIZE, bias=False, **shape))
    numbers = {"weight_decay": 0.1, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "momentum": 0.95}
    optimizers = build_optimizers(model, optimizer=optimizer, lr=1e-3, **numbers)
    settings = MODES[mode]
    if settings is not None:
        blocks = {"block_diagonal": width} if mode == "fast" else {}
        ActivationPreconditioner(model, **settings, **blocks).attach(*optimizers)
    tokens = torch.randint(VOCAB_SIZE, (BATCH_SIZE, BLOCK_SIZE + 1))
    x, y = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    def step() -> None:
        _, loss = model(x, y)
        loss.backward()
        for each in optimizers:
            each.step()
        model.zero_grad()

    return step


def measure(width: int, optimizer: str, rounds: int) -> dict[str, float]:
    """Median milliseconds per step of every mode."""
    steps = {mode: make_step(width, optimizer, mode) for mode in MODES}
    times: dict[str, list[float]] = {mode: [] for mode in MODES}
    for round_number in range(rounds + 1):
        for mode, step in steps.items():
            started = time.perf_counter()
            for _ in range(REFRESH_EVERY):
                step()
            if round_number:  # the first round warms up
                times[mode].append(1e3 * (time.perf_counter() - started) / REFRESH_EVERY)
    return {mode: statistics.median(values) for mode, values in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--widths", type=int, nargs="+", default=[128, 256, 512])
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--out", type=Path, help="write the result as JSON here")
    arguments = parser.parse_args()
    rows = []
    for width in arguments.widths:
        for optimizer in ("adamw", "muon"):
            ms = measure(width, optimizer, arguments.rounds)
            ratios = {mode: round(ms[mode] / ms["base"], 4) for mode in ("exact", "fast")}
            rows.append({"width": width, "optimizer": optimizer, "step_ms": ms, "ratio": ratios})
            print(f"width {width:4} {optimizer:6} base {ms['base']:7.1f} ms ", ratios, flush=True)
    result = {"machine": platform.machine(), "threads": torch.get_num_threads()}
    result |= {"torch": torch.__version__, "tokens": BATCH_SIZE * BLOCK_SIZE, "rows": rows}
    if arguments.out:
        arguments.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
