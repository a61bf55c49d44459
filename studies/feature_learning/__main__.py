"""Measure how far a layer's row space is from the true features, with and without DoPr.

    python -m studies.feature_learning --out FILE.json
    python -m studies.feature_learning --figure FILE.svg

The first command trains, writes the results and prints their table: four to five minutes
on one core. The second draws the committed results, or with --out the new ones.
docs/log/2026-11-29-feature-learning.md contains the protocol.
"""

import json
import sys
from pathlib import Path

import torch
from tqdm import tqdm

from data.files import write_atomic
from eval.command import command_parser
from studies.feature_learning.figure import draw
from studies.feature_learning.study import (
    FRESH_SEEDS,
    MODES,
    SETUPS,
    TUNING_SEED,
    measure,
    table_of,
)
from studies.feature_learning.task import FEATURES, INPUTS, OUTPUTS
from studies.feature_learning.training import BATCH_SIZE, RECORD_EVERY
from studies.optimizer_table import ROOT
from studies.report.style import svg

RESULTS = ROOT / "studies" / "results" / "feature_learning.json"


def main(argv: list[str]) -> None:
    parser = command_parser("studies.feature_learning", __doc__)
    parser.add_argument("--out", type=Path, help="train, and write the results to this file")
    parser.add_argument("--figure", type=Path, help="draw the results into this SVG file")
    arguments = parser.parse_args(argv)
    if arguments.out:
        torch.set_num_threads(1)
        result = {
            "sizes": {"d": INPUTS, "m": OUTPUTS, "k": FEATURES},
            "run": {"batch_size": BATCH_SIZE, "record_every": RECORD_EVERY},
            "modes": MODES,
            "tuning_seed": TUNING_SEED,
            "fresh_seeds": FRESH_SEEDS,
            "rows": list(tqdm(measure(), total=len(SETUPS) * len(MODES))),
        }
        write_atomic(arguments.out, json.dumps(result) + "\n")
    result = json.loads((arguments.out or RESULTS).read_text())
    if arguments.figure:
        write_atomic(arguments.figure, svg(draw(result)))
    print(table_of(result["rows"]))


if __name__ == "__main__":
    main(sys.argv[1:])
