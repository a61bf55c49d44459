"""TRL's SFTTrainer with a LoRA adapter resumes exactly."""

import pytest

for library in ("transformers", "accelerate", "peft", "trl", "datasets"):
    pytest.importorskip(library, reason=f"{library} is not installed")

from datasets import Dataset
from peft import LoraConfig
from trl import SFTConfig, SFTTrainer

from optim.integrations.transformers import DoprCallback
from tests.optim.integrations.tiny import assert_equal, gpt2, tokenizer, weights

pytestmark = pytest.mark.filterwarnings("ignore")  # of the libraries


def trainer(folder, callback: DoprCallback) -> SFTTrainer:
    settings = {"max_steps": 4, "save_steps": 2, "max_length": 16, "learning_rate": 1e-2}
    return SFTTrainer(
        gpt2(),
        SFTConfig(str(folder), use_cpu=True, report_to=[], **settings),
        train_dataset=Dataset.from_dict({"text": ["a b c d", "e f g h a", "b d"] * 16}),
        processing_class=tokenizer(),
        peft_config=LoraConfig(r=4, target_modules=["c_attn"], fan_in_fan_out=True),
        callbacks=[callback],
    )


def test_a_resumed_run_with_an_adapter_ends_with_the_same_weights(tmp_path):
    callback = DoprCallback(gamma=0.1, refresh_every=4, collect_every=2)
    whole = trainer(tmp_path, callback)
    whole.train()
    covered = [row["name"] for row in callback.report() if row["covered"]]
    assert ["lora_A" in covered[0], "lora_B" in covered[1], len(covered)] == [True, True, 2]
    again = trainer(tmp_path, DoprCallback(gamma=0.1, refresh_every=4, collect_every=2))
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert_equal(weights(again.model), weights(whole.model))
