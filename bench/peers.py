"""Measure the step time of DoPr against other preconditioners of more than a diagonal.

    python -m bench.peers [--widths 128 256 512] [--rounds 6] [--out FILE]

AdamW alone, with DoPr in its modes, SOAP, Shampoo and Kron (of pytorch_optimizer), and K-FAC (of
singd) train GPTs with the same weights and batch, as in bench.step_overhead. They take turns of one
step, ten in a round. All peers renew their preconditioners every tenth step, as DoPr does in fast
and in sampled mode; SOAP's are those of its defaults. SOAP, Shampoo and Kron also precondition the
embedding, which DoPr and K-FAC leave out. The last line of a width is the time that the
optimizer itself takes in a step, besides forward and backward. Requires pip install '.[optimizers]'
and pip install singd.
"""

from functools import partial
from typing import Any

import torch
from torch.optim import Optimizer

from bench.arguments import bench_parser
from bench.step_overhead import (
    NUMBERS,
    PRESETS,
    StepPreset,
    StepVariant,
    in_turns,
    make_optimizers,
    modes,
)
from bench.timing import measure_all
from eval.command import positive_int, reported_errors
from model import GPT
from optim.build import build_optimizers

EVERY = 10  # steps between updates of a preconditioner
PEERS = {  # name: class and arguments
    "SOAP": ("soap", f"precondition_frequency={EVERY}"),
    "Shampoo": ("shampoo", f"preconditioning_compute_steps={EVERY}"),
    "Kron": ("kron", f"pre_conditioner_update_probability={1 / EVERY}"),
}
NO_STEP = "forward and backward"


class NoStep(Optimizer):
    """Leaves the weights as they are, to time the rest of a step."""

    def __init__(self, model: GPT) -> None:
        super().__init__(model.parameters(), {})

    def step(self, closure: Any = None) -> None:
        pass


def kfac(model: GPT) -> list[Optimizer]:
    """Return singd's K-FAC for the linear layers, and AdamW for the other parameters.

    Raises ValueError if singd is not installed.
    """
    try:
        from singd.optim.optimizer import SINGD  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ValueError(f"K-FAC needs pip install singd ({error})") from error
    matrices, rest = build_optimizers(model, optimizer="muon", lr=1e-3, **NUMBERS)
    params = [param for group in matrices.param_groups for param in group["params"]]
    options: dict[str, Any] = {
        "kfac_like": True,
        "alpha1": 0.0,
        "T": EVERY,
        "warn_unsupported": False,
    }
    return [SINGD(model, params=params, lr=1e-3, damping=0.1, **options), rest]


def measure(preset: StepPreset, width: int, rounds: int) -> dict[str, Any]:
    """Return a row: the step times of all variants at a width, and their ratios to AdamW's."""
    makers: dict[str, Any] = {
        ("AdamW" if mode == "base" else f"DoPr, {mode}"): partial(
            make_optimizers, optimizer="adamw", dopr=dopr
        )
        for mode, dopr in modes(preset, width, "cholesky").items()
    }
    makers |= {
        name: partial(make_optimizers, optimizer=kind, dopr=None, optimizer_args=arguments)
        for name, (kind, arguments) in PEERS.items()
    }
    makers |= {"K-FAC": kfac, NO_STEP: lambda model: [NoStep(model)]}
    variants = {name: StepVariant(preset, width, make) for name, make in makers.items()}
    return {"width": width} | in_turns(variants, rounds)


def describe(row: dict[str, Any]) -> str:
    rest = row["step_ms"][NO_STEP]
    lines = [
        f"  {name:25} {ms:8.1f} ms  {row['ratio'][name]:6.3f}  optimizer {ms - rest:8.1f} ms"
        for name, ms in row["step_ms"].items()
    ]
    return "\n".join([f"width {row['width']}", *lines])


def main() -> None:
    parser = bench_parser("peers", __doc__, rounds=6)
    parser.add_argument("--preset", choices=("cpu", "tiny"), default="cpu")
    parser.add_argument("--widths", type=positive_int, nargs="+", help="default: the preset's")
    arguments = parser.parse_args()
    preset = PRESETS[arguments.preset]
    torch.manual_seed(0)
    with reported_errors(parser):
        measure_all(
            arguments.widths or preset.widths,
            lambda width: measure(preset, width, arguments.rounds),
            describe,
            arguments.out,
        )


if __name__ == "__main__":
    main()
