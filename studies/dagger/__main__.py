"""Compare cloning with DAgger (Ross et al., 2011) on a token task, with and without DoPr.

    python -m studies.dagger --task pdfa --optimizers adamw,muon --out FILE

docs/log/2026-11-29-dagger.md contains the protocol and the results. Cloning is an ordinary run of
train.py, which sees new documents of the oracle in every step. DAgger has the same settings and the
same number of sequences, in four rounds: after each round but the last, the model writes episodes
of its own, the oracle draws what it would have done in every state, and a half of each further
batch comes from these. Finished runs are not repeated, and the rows of earlier commands in FILE are
kept. With --show, nothing runs and the rows in FILE are printed.
"""

import sys
from itertools import product

from eval.command import reported_errors
from optim.build import OPTIMIZERS
from studies.dagger.comparison import (
    FRESH_SEEDS,
    METHODS,
    STEPS,
    TASKS,
    TUNING_SEED,
    Setup,
    key_of,
    measure,
)
from studies.dagger.tables import tables_of
from studies.dagger.training import ROUNDS
from studies.dagger.trial import OWN_SHARE
from studies.pool import pool_parser
from studies.rows import add_rows
from studies.sweep.variants import FAST_PREFIX


def main(argv: list[str]) -> None:
    parser = pool_parser("studies.dagger", __doc__)
    parser.add_argument("--task", choices=TASKS, default="pdfa")
    parser.add_argument("--optimizers", default="adamw,muon", help=f"of {', '.join(OPTIMIZERS)}")
    parser.add_argument("--show", action="store_true", help="run nothing, print the rows of FILE")
    arguments = parser.parse_args(argv)
    optimizers = dict.fromkeys(arguments.optimizers.split(","))
    if unknown := optimizers.keys() - {*OPTIMIZERS}:
        names = ", ".join(sorted(unknown))
        parser.error(f"--optimizers: {names or '(empty)'}: choose from {', '.join(OPTIMIZERS)}")
    variants = [mode + name for name in optimizers for mode in ("", FAST_PREFIX)]
    setups = [Setup(arguments.task, *each) for each in product(variants, METHODS)]
    header = {"steps": STEPS, "rounds": ROUNDS, "own_share": OWN_SHARE}
    header |= {"tuning_seed": TUNING_SEED, "seeds": [*FRESH_SEEDS]}
    with reported_errors(parser):
        path, keys = arguments.out, [] if arguments.show else setups
        rows = add_rows(path, measure, keys, key_of, workers=arguments.workers, header=header)
        if not rows:
            raise ValueError(f"{path} has no rows; run without --show")
        print(tables_of(rows))


if __name__ == "__main__":
    main(sys.argv[1:])
