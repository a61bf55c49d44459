"""Train and resume with the Trainer in every process of torchrun; the argument is a folder."""

import sys
from pathlib import Path

import torch

from tests.optim.integrations.test_transformers import trainer
from tests.optim.integrations.tiny import weights


def main(folder: Path) -> None:
    whole = trainer(folder, max_steps=4, save_steps=2)
    whole.train()
    again = trainer(folder, max_steps=4, save_strategy="no")
    again.train(resume_from_checkpoint=str(folder / "checkpoint-2"))
    # The sums of all processes are added in another order.
    torch.testing.assert_close(weights(again.model), weights(whole.model), rtol=0, atol=1e-5)
    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    torch.save(weights(whole.model), folder / f"{rank}-of-{size}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
