"""The steps of `python -m bench.gpu first`: what runs, for how long, and what it needs."""

from typing import NamedTuple

TRAINER = ("pydantic", "tqdm", "filelock", "safetensors", "tiktoken", "regex", "rustbpe")


class FirstStep(NamedTuple):
    """A module to run, with its time limit and its arguments at full size and with --tiny."""

    module: str
    limit_s: float
    full: tuple[str, ...] = ()
    tiny: tuple[str, ...] = ("--tiny",)
    needs: tuple[str, ...] = ()  # packages besides torch, triton and numpy
    has_seconds: bool = False  # whether the module accepts a time limit of its own
    uses_nanogpt: bool = False
    is_endless: bool = False  # whether every call continues the step


def kernels_step(operation: str, limit_s: float) -> FirstStep:
    return FirstStep("bench.first.kernels", limit_s, (operation,), (operation, "--tiny"))


STEPS = {
    "correctness": FirstStep("bench.first.correctness", 120),
    "steps": FirstStep("bench.first.steps", 240, has_seconds=True),
    "loop": FirstStep(
        *("bench.train_throughput", 150, ("--preset=gpt2", "--rounds=1", "--steps=14")),
        *(("--preset=tiny", "--rounds=1"), TRAINER),
        uses_nanogpt=True,
    ),
    "kernels_gram": kernels_step("gram", 30),
    "kernels_apply": kernels_step("apply", 30),
    "kernels_inverse": kernels_step("inverse", 60),
    "pretraining": FirstStep(
        *("bench.pretraining", 300, (), ("--tiny",), (*TRAINER, "scipy")),
        has_seconds=True,
        is_endless=True,
    ),
}
COMPILE_S = 120  # the time limit for filling the compiler's caches
COMPILE = [  # what does it, at the same time
    FirstStep("bench.first.steps", COMPILE_S, only, (*only, "--tiny"))
    for name in ("base", "recommended", "sampled", "exact")
    for only in [("--compile_only", name)]
]
