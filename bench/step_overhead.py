"""Measure the time and memory that DoPr adds to a training step.

    python -m bench.step_overhead [--preset cpu] [--widths 128 256 512] [--rounds 12] [--out FILE]
    python -m bench.step_overhead --preset gpt2 --rounds 3    # GPT-2 124M, 0.5M tokens a step: GPU

Each optimizer trains alone and with DoPr in four modes: exact (a new Σ and P in every step), the
same with Σ in blocks of the model's width, fast (Σ of every token, a new P every 10 steps) and
sampled (as fast, but Σ in such blocks, of one token in several and in one step in 10, as in
config/gpt2_dopr.py); fast and sampled also with `fresh_mean`.
The variants run in one process, on GPTs with the same weights and the same batch. They take turns
of one step; a round has as many turns as lie between two refreshes of these modes, so it contains
exactly one of them. The result has the median over rounds of the mean step time, and its ratio to
the optimizer alone. On a GPU it also has the peak memory of each variant in a round, including its
weights and optimizer state.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch.optim import Optimizer

from bench.arguments import bench_parser
from bench.timing import DEVICE, compared, measure_all, milliseconds
from model import GPT, GPTConfig
from optim import ActivationPreconditioner
from optim.build import OPTIMIZERS, build_optimizers
from optim.dopr.settings import INVERSES
from optim.kernels.dispatch import BACKENDS, Backend

NUMBERS: dict[str, Any] = {"weight_decay": 0.1, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8}
NUMBERS |= {"momentum": 0.95}


class StepPreset(NamedTuple):
    """The model, its batch, and the sampling of DoPr's sampled mode."""

    widths: tuple[int, ...]
    n_layer: int
    head_width: int
    block_size: int
    vocab_size: int
    micro_batch_size: int
    accumulation: int  # micro-batches per step
    token_stride: int
    refresh_every: int = 10
    compile_in_bf16: bool = False


PRESETS = {
    # 4,096 tokens per step, as in the demo
    "cpu": StepPreset((128, 256, 512), 4, 32, 128, 2048, 32, 1, 4),
    # 524,288 tokens per step
    "gpt2": StepPreset((768,), 12, 64, 1024, 50304, 32, 16, 8, compile_in_bf16=True),
    "tiny": StepPreset((16,), 1, 8, 8, 32, 2, 2, 2, refresh_every=2),
}


def modes(preset: StepPreset, width: int, inverse: str) -> dict[str, dict[str, Any] | None]:
    """Return the settings of DoPr in each mode. None trains without DoPr."""
    every = preset.refresh_every
    exact = {"gamma": 0.1, "inverse": inverse}
    fast = exact | {"sigma_beta": 0.95, "refresh_every": every}
    blocks, fresh = {"block_diagonal": width}, {"fresh_mean": True}
    sampling = {"collect_every": every, "token_stride": preset.token_stride}
    sampled = fast | sampling | blocks
    return {
        **{"base": None, "exact": exact, "exact, blocks": exact | blocks},
        **{"fast": fast, "sampled": sampled},
        **{"fast, fresh mean": fast | fresh, "sampled, fresh mean": sampled | fresh},
    }


def make_optimizers(
    model: GPT,
    optimizer: str,
    dopr: dict[str, Any] | None,
    backend: Backend = "auto",
    optimizer_args: str = "",
) -> list[Optimizer]:
    """Return the optimizers of a model, with DoPr attached unless it is None."""
    choices: dict[str, Any] = {"optimizer": optimizer, "optimizer_args": optimizer_args}
    optimizers = build_optimizers(model, lr=1e-3, backend=backend, **NUMBERS, **choices)
    if dopr is not None:
        ActivationPreconditioner(model, backend=backend, **dopr).attach(*optimizers)
    return optimizers


class StepVariant:
    """A fresh GPT and its optimizers, trained step by step.

    Args:
        make: function that returns the optimizers of a model.
    """

    def __init__(
        self, preset: StepPreset, width: int, make: Callable[[GPT], list[Optimizer]]
    ) -> None:
        torch.manual_seed(0)
        self.refresh_every, allocated_before = preset.refresh_every, allocated()
        self.model = GPT(gpt_config(preset, width)).to(DEVICE)
        self.optimizers = make(self.model)
        self.forward = torch.compile(self.model) if preset.compile_in_bf16 else self.model
        self.autocast = torch.autocast(DEVICE.type, torch.bfloat16, preset.compile_in_bf16)
        shape = (preset.accumulation, preset.micro_batch_size, preset.block_size + 1)
        tokens = torch.randint(preset.vocab_size, shape, device=DEVICE)
        self.x, self.y = tokens[..., :-1].contiguous(), tokens[..., 1:].contiguous()
        self.round()  # compiles, and creates the optimizer state
        self.resident = allocated() - allocated_before  # bytes held between two steps

    def step(self) -> None:
        for x, y in zip(self.x, self.y, strict=True):
            # every variant compiles the same code anew; dynamo would run the ninth eagerly
            with self.autocast, torch._dynamo.config.patch(recompile_limit=64):
                _, loss = self.forward(x, y, return_logits=False)
            (loss / len(self.x)).backward()
        for optimizer in self.optimizers:
            optimizer.step()
        self.model.zero_grad()

    def round(self) -> None:
        """Run the steps from one refresh of P to the next."""
        for _ in range(self.refresh_every):
            self.step()

    def measured_round(self) -> tuple[float, int]:
        """Return the milliseconds per step, and the peak bytes of this variant (0 on a CPU)."""
        ms, peak = self.measured(self.round)
        return ms / self.refresh_every, peak

    def measured(self, work: Callable[[], None]) -> tuple[float, int]:
        """Return the milliseconds of `work`, and the peak bytes of this variant (0 on a CPU)."""
        bytes_of_others = allocated() - self.resident
        if DEVICE.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        ms = milliseconds(work, DEVICE)
        peak = torch.cuda.max_memory_allocated() if DEVICE.type == "cuda" else 0
        return ms, max(0, peak - bytes_of_others)


def gpt_config(preset: StepPreset, width: int) -> GPTConfig:
    return GPTConfig(
        vocab_size=preset.vocab_size,
        block_size=preset.block_size,
        n_layer=preset.n_layer,
        n_head=width // preset.head_width,
        n_embd=width,
        bias=False,
    )


def allocated() -> int:
    return torch.cuda.memory_allocated() if DEVICE.type == "cuda" else 0


def measure(
    preset: StepPreset, width: int, optimizer: str, *, inverse: str, backend: Backend, rounds: int
) -> dict[str, Any]:
    """Return one row of the result: step times of every mode, and their memory in MiB."""
    variants = {
        mode: StepVariant(
            preset,
            width,
            partial(make_optimizers, optimizer=optimizer, dopr=dopr, backend=backend),
        )
        for mode, dopr in modes(preset, width, inverse).items()
    }
    names = {"width": width, "optimizer": optimizer, "inverse": inverse, "backend": backend}
    return names | in_turns(variants, rounds)


def in_turns(variants: dict[str, StepVariant], rounds: int) -> dict[str, Any]:
    """Measure the variants in turns; return times, ratios to the first one, and memory in MiB."""
    first = next(iter(variants.values()))
    times: dict[str, list[float]] = {name: [0.0] * rounds for name in variants}
    peaks = dict.fromkeys(variants, 0)
    for i in range(rounds):
        for _ in range(first.refresh_every):
            for name, variant in variants.items():
                ms, peak = variant.measured(variant.step)
                times[name][i] += ms / first.refresh_every
                peaks[name] = max(peaks[name], peak)
    result = compared(times)
    return {
        **{"tokens": first.x.numel(), "rounds": rounds},
        **{"step_ms": result["ms"], "ratio": result["ratio"]},
        "MiB": {name: peak / 2**20 for name, peak in peaks.items()},
    }


def describe(row: dict[str, Any]) -> str:
    figures = zip(row["step_ms"].items(), row["ratio"].values(), strict=True)
    texts = (f"{mode} {ms:.1f} ms ({ratio:.3f})" for (mode, ms), ratio in figures)
    return "  ".join([f"width {row['width']} {row['optimizer']}", *texts])


def main() -> None:
    parser = bench_parser("step_overhead", __doc__, rounds=12)
    parser.add_argument("--preset", choices=PRESETS, default="cpu")
    parser.add_argument("--widths", type=int, nargs="+", help="replace the preset's widths")
    parser.add_argument("--optimizers", nargs="+", choices=OPTIMIZERS, default=["adamw", "muon"])
    parser.add_argument("--inverse", choices=INVERSES, default="cholesky")
    parser.add_argument("--backend", choices=BACKENDS, default="auto")
    arguments = parser.parse_args()
    preset = PRESETS[arguments.preset]
    if preset.compile_in_bf16 and DEVICE.type != "cuda":
        parser.error(f"--preset {arguments.preset} needs a CUDA GPU; use --preset cpu")
    options = {key: getattr(arguments, key) for key in ("inverse", "backend", "rounds")}

    def measure_case(case: tuple[int, str]) -> dict[str, Any]:
        width, optimizer = case
        return measure(preset, width, optimizer, **options)

    widths = arguments.widths or preset.widths
    cases = [(width, optimizer) for width in widths for optimizer in arguments.optimizers]
    measure_all(cases, measure_case, describe, arguments.out)


if __name__ == "__main__":
    main()
