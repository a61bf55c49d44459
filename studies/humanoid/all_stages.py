"""Run the study of docs/humanoid.md: hours of CPU time; continues where it was stopped.

    python -m studies.humanoid.all_stages                 everything, then the tables
    python -m studies.humanoid.all_stages noise           the stages whose names begin like this

A stage is one command of studies.sweep.compare, with a folder of its own under --out. The clones
are those of the expert `walk-1`, but for the stages `stand`, `grid-...`, `why-...` and
`own-...`. The comparison at equal validation loss is a command of its own,
studies.humanoid.matched.
"""

import sys

from studies.humanoid.tables import table
from studies.rollout.all_stages import BASES, RolloutStage
from studies.stages import run_stages
from studies.stats.records import RECORDS

TASK = "humanoid,expert=walk-1"
STAND = "humanoid,expert=stand,demonstrations=90,length=100"  # later it hardly moves
STEPS, SEEDS = 2000, 5
PAIR = ("adamw", "fast-dopr-adamw")
OPTIMIZERS = (
    *PAIR,
    *("dopr-adamw", "fast-dopr-adamw+fresh_mean=true"),
    *("fast-dopr-adamw+include=0", "fast-dopr-adamw+exclude=0", "adamw+ema_decay=0.99"),
    *("muon", "fast-dopr-muon", "dopr-muon", "fast-dopr-muon+fresh_mean=true"),
    *("signum", "fast-dopr-signum", "adamuon", "fast-dopr-adamuon", "sgd", "fast-dopr-sgd"),
)
FIRST_LAYER_RATES = (2.5e-4, 5e-4, 1e-3, 2e-3, 8e-3, 1.6e-2)
MODES = ("{}", "dopr-{}", "fast-dopr-{}", "fast-dopr-{}+fresh_mean=true")


def short_stage(
    name: str, task: str, optimizers: tuple[str, ...], seeds: int = SEEDS
) -> RolloutStage:
    """Return a stage with half of the steps and episodes of the others, and one tuning seed."""
    return RolloutStage(name, task, STEPS // 2, optimizers, seeds, tuning_seeds=1, episodes=10)


GRID = tuple(  # every optimizer in every mode
    short_stage(
        f"grid-{expert}-{n}",
        f"humanoid,expert={expert},demonstrations={n}",
        tuple(mode.format(base) for base in BASES for mode in MODES),
    )
    for n in (10, 20)
    for expert in ("walk-0", "walk-1", "walk-2")
)
OWN_SIGMA = tuple(  # 200 to 204 are the seeds of `grid`
    short_stage(
        f"own-sigma-{base}{suffix}",
        f"humanoid,expert={expert},demonstrations=10{knobs}",
        tuple(variant.format(base) for variant in variants),
        seeds=13,
    )
    for base, expert in (("adamw", "walk-2"), ("signum", "walk-1"))
    for suffix, knobs, variants in (
        ("", "", ("{}", "dopr-{}", "dopr-{}+sigma_beta=0.5", "dopr-{}+sigma_beta=0.95")),
        ("-another", ",sigma_batch=another", ("dopr-{}",)),
    )
)
OWN_BATCH = tuple(
    short_stage(
        f"own-batch-{size}",
        f"humanoid,expert=walk-2,demonstrations=10,batch_size={size}",
        ("dopr-adamw", "dopr-adamw+sigma_beta=0.95"),
        seeds=8,
    )
    for size in (64, 256)
)
STAGES = (
    RolloutStage("optimizers", TASK, STEPS, OPTIMIZERS),
    RolloutStage("noise", f"{TASK},noise=0.08", STEPS, PAIR, SEEDS),
    RolloutStage("whitening-0.5", f"{TASK},whitening=0.5", STEPS, PAIR, SEEDS),
    RolloutStage("whitening-0.9", f"{TASK},whitening=0.9", STEPS, PAIR, SEEDS),
    RolloutStage("demonstrations-20", f"{TASK},demonstrations=20", STEPS, PAIR, SEEDS),
    RolloutStage("stand", STAND, STEPS, (*PAIR, "muon"), SEEDS),
    RolloutStage(
        "first-layer",
        TASK,
        STEPS,
        ("adamw", *(f"adamw+embedding_lr={lr:g}" for lr in FIRST_LAYER_RATES)),
        SEEDS,
    ),
    RolloutStage("ten-times-the-steps", TASK, 10 * STEPS, PAIR[:1], SEEDS),
    short_stage(
        "why-exact",
        "humanoid,expert=walk-2,demonstrations=10",
        (
            *(*PAIR, "dopr-adamw", "dopr-adamw+sigma_beta=0.95", "fast-dopr-adamw+sigma_beta=none"),
            "fast-dopr-adamw+sigma_beta=none+collect_every=10",
        ),
    ),
    short_stage(
        "why-own-noise",
        "humanoid,expert=walk-2,demonstrations=10,label_noise=0.4",
        (*PAIR, "dopr-adamw", "dopr-adamw+sigma_beta=0.95"),
    ),
    short_stage(
        "why-own-batch",
        "humanoid,expert=walk-2,demonstrations=10,batch_size=512",
        ("adamw", "dopr-adamw", "dopr-adamw+sigma_beta=0.95"),
    ),
    *OWN_SIGMA,
    *OWN_BATCH,
    *GRID,
)


def main(argv: list[str]) -> None:
    names = {"module": "studies.humanoid.all_stages", "about": __doc__}
    out = run_stages(argv, STAGES, out="out/humanoid", **names)
    for stage in STAGES:
        if (out / stage.name / RECORDS).exists():
            print(f"\n{stage.name}\n\n{table(out / stage.name)}")


if __name__ == "__main__":
    main(sys.argv[1:])
