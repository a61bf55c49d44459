"""Run the board: optimizers of the literature with DoPr and without, on four rollout tasks.

    python -m studies.board                  everything: days of a core; continues where it stopped
    python -m studies.board pdfa ctrl-soap   a task, one optimizer on a task

A stage is one command of studies.sweep.compare for one optimizer, with a folder of its own under
--out, which `python -m studies.submit FOLDER` adds to the board. The protocol is in
docs/log/2026-11-29-board.md.
"""

import sys

from studies.board.stages import STAGES
from studies.stages import run_stages


def main(argv: list[str]) -> None:
    run_stages(argv, STAGES, module="studies.board", about=__doc__, out="out/board")


if __name__ == "__main__":
    main(sys.argv[1:])
