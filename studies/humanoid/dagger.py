"""Compare cloning with DAgger (Ross et al., 2011), with and without DoPr.

    python -m studies.humanoid.dagger --out FILE --optimizers adamw,muon

DAgger trains in rounds. After each round but the last, the clone runs some episodes, the expert
says what it would have done in every state, and training goes on with these states in the data. All
runs begin with the same demonstrations and have the same number of steps and one schedule. Rates
are tuned by validation loss on a seed of their own, separately for each of the four combinations.
That loss is measured on the expert's states, which DAgger does not aim at, and clones that fall
early add fewer states: both are to the disadvantage of DAgger with a weak optimizer.
The rows of earlier commands in FILE are kept.
"""

from dataclasses import dataclass
from functools import partial
from itertools import product

import numpy as np

from eval.command import reported_errors
from eval.tables import markdown
from studies.humanoid.cloning import Clone
from studies.humanoid.demonstrations import expert_policy
from studies.humanoid.episodes import rollout
from studies.humanoid.grading import grade_policy
from studies.humanoid.tables import with_half
from studies.humanoid.task import Humanoid
from studies.humanoid.trial import HumanoidTrial, clone_of
from studies.pool import pool_parser
from studies.rows import Row, add_rows
from studies.stats.seeds import over_seeds
from studies.sweep.study import FRESH, best_rate, search_rates
from studies.sweep.variants import FAST_PREFIX

STEPS, ROUNDS = 2000, 4
EPISODES = 5  # of the clone, after each round but the last
FIRST_SEED = 1000  # of the first states of these episodes
FRESH_SEEDS = range(FRESH, FRESH + 5)
METRICS = ("val_loss", "return", "falls", "length")


@dataclass(frozen=True)
class Setup:
    """A row of the comparison: the expert, the variant, and the method (cloning or DAgger)."""

    expert: str
    variant: str
    method: str


def own_states(
    clone: Clone, expert: str, seed: int, episodes: int = EPISODES
) -> tuple[np.ndarray, np.ndarray]:
    """Return the states of episodes of a clone, and what the expert would do there."""
    states = np.concatenate(rollout(clone, episodes, seed).observations)
    return states, expert_policy(expert)(states).astype(np.float32)


def train(setup: Setup, lr: float, seed: int) -> Clone | None:
    """Return the clone of a run; None if it diverged."""
    settings = dict(HumanoidTrial.parse_variant(setup.variant).settings) | {"max_steps": STEPS}
    data_at_step = {}
    if setup.method == "DAgger":
        for i in range(1, ROUNDS):
            first = FIRST_SEED + ROUNDS * seed + i
            data_at_step[i * STEPS // ROUNDS] = partial(own_states, expert=setup.expert, seed=first)
    return clone_of(Humanoid(expert=setup.expert), settings, lr, seed, data_at_step)


def train_and_grade(setup: Setup, lr: float, seed: int, n: int) -> dict[str, float]:
    """Train and grade a run. Return its metrics; NaN if it diverged."""
    clone = train(setup, lr, seed)
    if not clone:
        return dict.fromkeys(METRICS, float("nan"))
    means = grade_policy(Humanoid(expert=setup.expert), clone, n, 0).means()
    return {key: means[key] for key in METRICS}


def measure(setup: Setup) -> Row:
    """Tune the rate, run the fresh seeds and return a row with the metrics of each seed."""

    def loss_of(lr: float) -> float:
        return float(np.nan_to_num(train_and_grade(setup, lr, 0, 1)["val_loss"], nan=np.inf))

    optimizer = HumanoidTrial.parse_variant(setup.variant).optimizer
    losses = search_rates(loss_of, HumanoidTrial.first_rates(optimizer), setup.variant)
    lr, n = best_rate(losses), Humanoid.default_episodes
    runs = [train_and_grade(setup, lr, seed, n) for seed in FRESH_SEEDS]
    names = {"expert": setup.expert, "variant": setup.variant, "method": setup.method}
    metrics = {key: [run[key] for run in runs] for key in METRICS}
    return names | {"lr": lr, "sweep": losses} | metrics


def key_of(row: Row) -> Setup:
    return Setup(row["expert"], row["variant"], row["method"])


def table_of(rows: list[Row]) -> str:
    """Return a line for every row, with the difference to cloning with the same optimizer."""
    returns = {key_of(row): np.array(row["return"]) for row in rows}
    cells = []
    for setup, row in zip(returns, rows, strict=True):
        cloning = Setup(setup.expert, setup.variant, "cloning")
        gain = ""
        if setup != cloning and cloning in returns:
            gain = with_half(over_seeds((returns[setup] - returns[cloning]).tolist()), "+,.0f")
        mean = with_half(over_seeds(row["return"]), ",.0f")
        falls, loss = f"{np.mean(row['falls']):.2f}", f"{np.mean(row['val_loss']):.5f}"
        names = (setup.expert, f"`{setup.variant}`", setup.method, f"{row['lr']:g}")
        cells.append((*names, loss, mean, falls, gain))
    header = ("expert", "optimizer", "", "lr", "val loss", "return", "falls", "minus cloning")
    return markdown(header, cells)


def main() -> None:
    parser = pool_parser("studies.humanoid.dagger", __doc__)
    parser.add_argument("--optimizers", default="adamw,muon", help="comma-separated")
    parser.add_argument("--expert", default="walk-1")
    arguments = parser.parse_args()
    names = product(arguments.optimizers.split(","), ("", FAST_PREFIX), ("cloning", "DAgger"))
    setups = [Setup(arguments.expert, mode + name, method) for name, mode, method in names]
    with reported_errors(parser):
        for setup in setups:
            Humanoid(expert=setup.expert)
            HumanoidTrial.parse_variant(setup.variant)
        rows = add_rows(
            *(arguments.out, measure, setups, key_of),
            workers=arguments.workers,
            header={
                **{"steps": STEPS, "rounds": ROUNDS},
                **{"episodes": EPISODES, "seeds": [*FRESH_SEEDS]},
            },
        )
        print(table_of(rows))


if __name__ == "__main__":
    main()
