"""Run the block of docs/integrations.md on torchtitan in every process of torchrun.

The first argument is a file for the losses and the summary. The others are torchtitan's.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch

import tests.optim.integrations.titan_config  # noqa: F401 - before the rest of torchtitan
from tests.optim.integrations.page import block_of


def main(results: Path) -> None:
    names: dict[str, Any] = {}
    exec(block_of("torchtitan"), names)
    if torch.distributed.get_rank() == 0:
        losses = names["trainer"].metrics_processor.losses
        summary = names["preconditioner"].summary()
        results.write_text(json.dumps({"losses": losses, "summary": summary}))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv.pop(1)))
