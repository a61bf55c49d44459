"""The Python blocks of docs/integrations.md run as they stand; torchtitan's in its own test."""

import pytest
import torch

for library in ("transformers", "accelerate", "peft", "trl", "lightning", "datasets"):
    pytest.importorskip(library, reason=f"{library} is not installed")

import lightning.pytorch
from datasets import Dataset
from torch.utils.data import DataLoader

from tests.optim.integrations.page import block_of
from tests.optim.integrations.tiny import examples, gpt2, tokenizer
from tests.optim.models import mlp, regression

pytestmark = pytest.mark.filterwarnings("ignore")  # of the libraries


class Regression(lightning.pytorch.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = mlp()

    def training_step(self, batch, batch_idx):
        x, target = batch
        return (self.net(x) - target).square().mean()

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def names_of(section: str) -> dict[str, object]:
    """Return what the reader brings to a block."""
    batches = DataLoader([regression(step, n=16) for step in range(4)], batch_size=None)
    if section == "Lightning":
        return {"model": Regression(), "loader": batches}
    if section == "Accelerate":
        model = mlp()
        optimizer = torch.optim.AdamW(model.parameters())
        return {"model": model, "optimizer": optimizer, "loader": batches}
    data = Dataset.from_dict({"text": ["a b c d", "e f g h a", "b d"] * 8})
    if section == "TRL":
        return {"model": gpt2(), "data": data, "tokenizer": tokenizer()}
    return {"model": gpt2(), "data": examples()}


@pytest.mark.parametrize(
    ("section", "steps"),
    [("Hugging Face Trainer", 4), ("TRL", 2), ("Lightning", 4), ("Accelerate", 4), ("PEFT", 0)],
)
def test_a_block_of_the_page_runs(section, steps, tmp_path, monkeypatch):
    block = block_of(section)
    monkeypatch.chdir(tmp_path)
    names = names_of(section)
    exec(block, names)
    attached = names["callback" if "callback" in names else "preconditioner"]
    assert f"steps: {steps}," in attached.summary()
