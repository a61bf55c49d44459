"""What does DoPr add to a step? Time and memory of an optimizer and its DoPr versions, in turns.

    python -m bench.step_overhead [--preset cpu] [--widths 128 256 512] [--rounds 12] [--out FILE]
    python -m bench.step_overhead --preset gpt2 --rounds 3    # GPT-2 124M, 0.5M tokens a step: GPU

One process, one GPT per variant with the same weights and the same batch. Variants take turns of as
many steps as lie between two refreshes of the fast mode, so that its turn holds exactly one.
Reported: median over rounds of the mean step time, and its ratio to the base's; on a GPU the most
memory that a variant holds during a round, its weights and optimizer state included.
"""

from pathlib import Path
from typing import Any, NamedTuple

import torch

from bench.timing import DEVICE, compared, facts, milliseconds, write_rows
from eval.command import command_parser
from model import GPT, GPTConfig
from optim import ActivationPreconditioner
from optim.build import OPTIMIZERS, build_optimizers
from optim.dopr.layer import INVERSES
from optim.kernels.dispatch import BACKENDS, Backend


class Preset(NamedTuple):
    """The model, its batch, and how the fast mode samples tokens."""

    widths: tuple[int, ...]
    n_layer: int
    head_width: int
    block_size: int
    vocab_size: int
    micro_batch_size: int
    accumulation: int  # micro-batches of a step
    token_stride: int
    refresh_every: int = 10
    compile_in_bf16: bool = False


PRESETS = {
    "cpu": Preset((128, 256, 512), 4, 32, 128, 2048, 32, 1, 4),  # 4,096 tokens, as in the demo
    "gpt2": Preset((768,), 12, 64, 1024, 50304, 32, 16, 8, compile_in_bf16=True),  # 524,288 tokens
    "tiny": Preset((16,), 1, 8, 8, 32, 2, 2, 2, refresh_every=2),
}


def modes(preset: Preset, width: int, inverse: str) -> dict[str, dict[str, Any] | None]:
    """The settings of DoPr in each mode; None: no DoPr."""
    every = preset.refresh_every
    exact = {"gamma": 0.1, "inverse": inverse}
    lazy = {"sigma_beta": 0.95, "refresh_every": every, "collect_every": every}
    sampled = {"token_stride": preset.token_stride, "block_diagonal": width}
    return {"base": None, "exact": exact, "fast": exact | lazy | sampled}


class Variant:
    """Training of a fresh GPT, step by step."""

    def __init__(
        self,
        preset: Preset,
        width: int,
        optimizer: str,
        dopr: dict[str, Any] | None,
        backend: Backend,
    ) -> None:
        torch.manual_seed(0)
        self.refresh_every, before = preset.refresh_every, allocated()
        shape: dict[str, Any] = {
            "n_layer": preset.n_layer,
            "block_size": preset.block_size,
            "n_embd": width,
        }
        shape |= {"n_head": width // preset.head_width, "vocab_size": preset.vocab_size}
        self.model = GPT(GPTConfig(bias=False, **shape)).to(DEVICE)
        numbers = {"weight_decay": 0.1, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "momentum": 0.95}
        chosen: dict[str, Any] = {"optimizer": optimizer, "backend": backend}
        self.optimizers = build_optimizers(self.model, lr=1e-3, **numbers, **chosen)
        if dopr is not None:
            preconditioner = ActivationPreconditioner(self.model, backend=backend, **dopr)
            preconditioner.attach(*self.optimizers)
        self.forward = torch.compile(self.model) if preset.compile_in_bf16 else self.model
        self.autocast = torch.autocast(DEVICE.type, torch.bfloat16, preset.compile_in_bf16)
        rows = preset.accumulation, preset.micro_batch_size
        tokens = torch.randint(preset.vocab_size, (*rows, preset.block_size + 1), device=DEVICE)
        self.x, self.y = tokens[..., :-1].contiguous(), tokens[..., 1:].contiguous()
        self.round()  # compiles, and makes the optimizers' state
        self.held = allocated() - before  # bytes between two steps

    def round(self) -> None:
        """The steps from one refresh of the fast mode to the next."""
        for _ in range(self.refresh_every):
            for x, y in zip(self.x, self.y, strict=True):
                with self.autocast:
                    _, loss = self.forward(x, y, return_logits=False)
                (loss / len(self.x)).backward()
            for optimizer in self.optimizers:
                optimizer.step()
            self.model.zero_grad()

    def measured_round(self) -> tuple[float, int]:
        """Milliseconds of a step, and the most bytes that this variant held; 0 on a CPU."""
        others = allocated() - self.held
        if DEVICE.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        ms = milliseconds(self.round, DEVICE) / self.refresh_every
        most = torch.cuda.max_memory_allocated() if DEVICE.type == "cuda" else 0
        return ms, max(0, most - others)


def allocated() -> int:
    return torch.cuda.memory_allocated() if DEVICE.type == "cuda" else 0


def measure(
    preset: Preset, width: int, optimizer: str, *, inverse: str, backend: Backend, rounds: int
) -> dict[str, Any]:
    """One row of the result: step times of every mode, and their memory in MiB."""
    variants = {
        mode: Variant(preset, width, optimizer, dopr, backend)
        for mode, dopr in modes(preset, width, inverse).items()
    }
    times: dict[str, list[float]] = {mode: [] for mode in variants}
    most = dict.fromkeys(variants, 0)
    for _ in range(rounds):
        for mode, variant in variants.items():
            ms, held = variant.measured_round()
            times[mode].append(ms)
            most[mode] = max(most[mode], held)
    result = compared(times)
    return {
        **{"width": width, "optimizer": optimizer, "inverse": inverse, "backend": backend},
        **{"tokens": variants["base"].x.numel(), "rounds": rounds},
        **{"step_ms": result["ms"], "ratio": result["ratio"]},
        "MiB": {mode: held / 2**20 for mode, held in most.items()},
    }


def main() -> None:
    parser = command_parser("bench.step_overhead", __doc__)
    parser.add_argument("--preset", choices=PRESETS, default="cpu")
    parser.add_argument("--widths", type=int, nargs="+", help="instead of the preset's")
    parser.add_argument("--optimizers", nargs="+", choices=OPTIMIZERS, default=["adamw", "muon"])
    parser.add_argument("--inverse", choices=INVERSES, default="cholesky")
    parser.add_argument("--backend", choices=BACKENDS, default="auto")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--out", type=Path, help="write the result as JSON here")
    arguments = parser.parse_args()
    preset = PRESETS[arguments.preset]
    if preset.compile_in_bf16 and DEVICE.type != "cuda":
        parser.error(f"--preset {arguments.preset} needs a CUDA GPU; use cpu")
    environment, rows = facts(DEVICE), []
    for width in arguments.widths or preset.widths:
        for optimizer in arguments.optimizers:
            choices = {"inverse": arguments.inverse, "backend": arguments.backend}
            rows.append(measure(preset, width, optimizer, rounds=arguments.rounds, **choices))
            figures = zip(rows[-1]["step_ms"].items(), rows[-1]["ratio"].values(), strict=True)
            texts = (f"{mode} {ms:.1f} ms ({ratio:.3f})" for (mode, ms), ratio in figures)
            print(f"width {width} {optimizer}", *texts, sep="  ", flush=True)
            write_rows(arguments.out, environment, rows)


if __name__ == "__main__":
    main()
