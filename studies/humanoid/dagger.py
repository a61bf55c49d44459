"""Compare cloning with DAgger (Ross et al., 2011), with and without DoPr.

    python -m studies.humanoid.dagger --out FILE --optimizers adamw,muon

DAgger trains in rounds. After each round but the last, the clone runs some episodes, the expert
says what it would have done in every state, and training goes on with these states in the data. All
runs begin with the same demonstrations and have the same number of steps and one schedule. Rates
are tuned by validation loss on a seed of their own, separately for each of the four combinations.
The rows of earlier commands in FILE are kept.
"""

import json
from dataclasses import dataclass
from functools import partial
from itertools import product

import numpy as np

from data.files import write_atomic
from eval.tables import markdown
from studies.humanoid.cloning import Clone
from studies.humanoid.demonstrations import expert_policy
from studies.humanoid.environment import rollout
from studies.humanoid.grading import grade_policy
from studies.humanoid.tables import shown
from studies.humanoid.task import Humanoid
from studies.humanoid.trial import HumanoidTrial, clone_of
from studies.pool import Row, kept_rows, map_in_pool, pool_parser
from studies.stats.seeds import over_seeds
from studies.sweep.study import FRESH, best_rate, search_rates

STEPS, ROUNDS = 2000, 4
EPISODES = 5  # of the clone, after each round but the last
FIRST_SEED = 1000  # of the first states of these episodes
FRESH_SEEDS = range(FRESH, FRESH + 5)
METRICS = ("val_loss", "return", "falls", "length")


@dataclass(frozen=True)
class Setup:
    """What is trained, and how: the expert, the name of the variant, "cloning" or "DAgger"."""

    expert: str
    variant: str
    method: str


def own_states(
    clone: Clone, expert: str, seed: int, episodes: int = EPISODES
) -> tuple[np.ndarray, np.ndarray]:
    """Return the states of episodes of a clone, and what the expert would do there."""
    states = np.concatenate(rollout(clone, episodes, seed).observations)
    return states, expert_policy(expert)(states).astype(np.float32)


def trained(setup: Setup, lr: float, seed: int) -> Clone | None:
    """Return the clone of a run; None if it diverged."""
    settings = dict(HumanoidTrial.parse_variant(setup.variant).settings) | {"max_steps": STEPS}
    more = {}
    if setup.method == "DAgger":
        for i in range(1, ROUNDS):
            first = FIRST_SEED + ROUNDS * seed + i
            more[i * STEPS // ROUNDS] = partial(own_states, expert=setup.expert, seed=first)
    return clone_of(Humanoid(expert=setup.expert), settings, lr, seed, more)


def graded(setup: Setup, lr: float, seed: int, n: int) -> dict[str, float]:
    """Train and grade a run. Return its metrics; NaN if it diverged."""
    clone = trained(setup, lr, seed)
    if not clone:
        return dict.fromkeys(METRICS, float("nan"))
    means = grade_policy(Humanoid(expert=setup.expert), clone, n, 0).means()
    return {key: means[key] for key in METRICS}


def measure(setup: Setup) -> Row:
    """Tune the rate, run the fresh seeds and return a row with the metrics of each seed."""

    def loss_of(lr: float) -> float:
        return float(np.nan_to_num(graded(setup, lr, 0, 1)["val_loss"], nan=np.inf))

    optimizer = HumanoidTrial.parse_variant(setup.variant).optimizer
    losses = search_rates(loss_of, HumanoidTrial.first_rates(optimizer))
    runs = [
        graded(setup, best_rate(losses), seed, Humanoid.default_episodes) for seed in FRESH_SEEDS
    ]
    names = {"expert": setup.expert, "variant": setup.variant, "method": setup.method}
    metrics = {key: [run[key] for run in runs] for key in METRICS}
    return names | {"lr": best_rate(losses), "sweep": losses} | metrics


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
            gain = shown(over_seeds((returns[setup] - returns[cloning]).tolist()), "+,.0f")
        mean = shown(over_seeds(row["return"]), ",.0f")
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
    rows = kept_rows(arguments.out, key_of)
    names = product(arguments.optimizers.split(","), ("", "fast-dopr-"), ("cloning", "DAgger"))
    setups = [Setup(arguments.expert, mode + name, method) for name, mode, method in names]
    rows |= {key_of(row): row for row in map_in_pool(measure, setups, arguments.workers)}
    protocol = {"steps": STEPS, "rounds": ROUNDS, "episodes": EPISODES, "seeds": [*FRESH_SEEDS]}
    write_atomic(arguments.out, json.dumps(protocol | {"rows": [*rows.values()]}) + "\n")
    print(table_of([*rows.values()]))


if __name__ == "__main__":
    main()
