"""Make the runs of the comparison: tune the rate of each combination, and run the fresh seeds."""

from dataclasses import dataclass, replace

from eval.rollout.tasks.ctrl import Ctrl
from eval.rollout.tasks.nav import Nav
from eval.rollout.tasks.pdfa import Pdfa
from eval.rollout.tasks.task import OracleTask
from studies.dagger.trial import DaggerTrial
from studies.optimizer_table import ROOT
from studies.rollout.all_stages import EPISODES
from studies.rows import Row
from studies.stats.errors import log_error, metric
from studies.stats.records import val_loss
from studies.sweep.study import Study, best_rate, mean_loss, search_rates
from studies.sweep.trial import TrainTrial, Trial, run_trial
from studies.sweep.variants import Variant, parse_variant

TASKS: dict[str, type[OracleTask]] = {each.name: each for each in (Pdfa, Ctrl, Nav)}
METHODS: dict[str, type[Trial]] = {"cloning": TrainTrial, "DAgger": DaggerTrial}
CLONING, DAGGER = METHODS
RUNS = ROOT / "out" / "dagger"
STEPS, TOKENS_PER_STEP = 500, 1024  # as in studies.sweep.compare
TUNING_SEED, FRESH_SEEDS = 0, range(400, 405)
METRICS = {  # of the model's own rollouts; the first one ranks
    "pdfa": ("jeffreys", "accumulated_kl", "gap", "unlikely_share"),
    "ctrl": ("failure", "cost", "action_error"),
    "nav": ("success", "legality", "novel_optimality", "familiar_optimality"),
}


@dataclass(frozen=True)
class Setup:
    """A combination, which is a row of the results: the task, the variant, and the method."""

    task: str
    variant: str
    method: str

    @property
    def parsed(self) -> Variant:
        return parse_variant(self.variant)

    @property
    def base(self) -> "Setup":
        """The combination without DoPr."""
        return replace(self, variant=self.parsed.base)

    @property
    def cloning(self) -> "Setup":
        """The combination without DAgger."""
        return replace(self, method=CLONING)

    def trial(self, role: str, lr: float, seed: int, n: int) -> Trial:
        """Return one run, graded in n episodes: of train.py, or DAgger with the same settings."""
        task = TASKS[self.task]()
        study = Study(
            out=RUNS / f"{self.task}-{self.method}",
            task=task,
            variants=(self.parsed,),
            steps=STEPS,
            tuning_seeds=1,
            fresh_seeds=len(FRESH_SEEDS),
            n=n,
            settings=TrainTrial.sizes(task, STEPS, TOKENS_PER_STEP),
        )
        return study.trial(self.parsed, role, lr, seed, METHODS[self.method])


def key_of(row: Row) -> Setup:
    return Setup(row["task"], row["variant"], row["method"])


def measure(setup: Setup) -> Row:
    """Tune the rate, run the fresh seeds and return a row with the metrics of each seed.

    Runs that an earlier command finished are not repeated. The metrics of a run that diverged are
    NaN.
    """

    def loss_of(lr: float) -> float:
        return mean_loss([run_trial(setup.trial("tuning", lr, TUNING_SEED, 1))])

    losses = search_rates(loss_of, TrainTrial.first_rates(setup.parsed.optimizer), setup.variant)
    lr, n = best_rate(losses), EPISODES[setup.task]
    records = [run_trial(setup.trial("fresh", lr, seed, n)) for seed in FRESH_SEEDS]
    row = vars(setup) | {"lr": lr, "sweep": losses}
    row |= {"val_loss": [*map(val_loss, records)], "log_error": [*map(log_error, records)]}
    if setup.method == DAGGER:
        row["label_share"] = [record["label_share"] for record in records]
    return row | {key: [metric(each, key) for each in records] for key in METRICS[setup.task]}
