"""Does DoPr still help AdamW's rollouts if the embedding has a learning rate of its own?

    python -m studies.rollout.embedding         everything: hours; continues where it stopped
    python -m studies.rollout.embedding pdfa    one task

Each mode runs with one rate for all parameters and with each of EMBEDDING_RATES for the tied
embedding, while the rate of the other parameters is tuned. The protocol is in
docs/log/2026-12-01-embedding-rate.md.
"""

import sys

from studies.rollout.all_stages import RolloutStage
from studies.stages import run_stages
from studies.sweep.variants import FAST_PREFIX

BASE, EXACT, FAST = "adamw", "dopr-adamw", f"{FAST_PREFIX}adamw"
EMBEDDING_RATES = (None, 0.016, 0.064)  # None: that of the other parameters
MODES = {"pdfa": (BASE, EXACT, FAST), "nav": (BASE, EXACT, FAST), "ctrl": (BASE, FAST)}


def with_rate(mode: str, rate: float | None) -> str:
    """Return the name of the variant whose embedding has that rate."""
    return mode if rate is None else f"{mode}+embedding_lr={rate:g}"


STAGES = tuple(
    RolloutStage(
        task, task, 500, tuple(with_rate(mode, rate) for rate in EMBEDDING_RATES for mode in modes)
    )
    for task, modes in MODES.items()
)


def main(argv: list[str]) -> None:
    run_stages(
        argv, STAGES, module="studies.rollout.embedding", about=__doc__, out="out/embedding_rate"
    )


if __name__ == "__main__":
    main(sys.argv[1:])
