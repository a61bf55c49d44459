"""The callback of the Hugging Face Trainer: attach, save, resume, refuse."""

import shutil
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("accelerate", reason="accelerate is not installed")

from accelerate.utils import DistributedType
from transformers import Trainer, TrainerCallback, TrainingArguments

from optim import ActivationPreconditioner
from optim.integrations.transformers import DoprCallback, check_supported
from tests.optim.integrations.tiny import LENGTH, assert_equal, examples, gpt2, weights

pytestmark = pytest.mark.xdist_group("transformers")  # its fixtures are slow

SETTINGS = {"gamma": 0.1, "refresh_every": 2, "sigma_beta": 0.9}  # state that outlives a step


def trainer(folder, *, model=None, data=None, callbacks=None, **changes):
    arguments = {
        **{"output_dir": str(folder), "use_cpu": True, "report_to": [], "disable_tqdm": True},
        **{"max_steps": 6, "save_steps": 3, "logging_steps": 1, "learning_rate": 1e-2},
        **{"per_device_train_batch_size": 4, "dataloader_pin_memory": False},
    }
    data = data or examples()
    callbacks = [DoprCallback(**SETTINGS)] if callbacks is None else callbacks
    arguments = TrainingArguments(**arguments | changes)
    model = model or gpt2()
    return Trainer(model, arguments, train_dataset=data, eval_dataset=data, callbacks=callbacks)


@pytest.fixture(scope="module")
def six_steps(tmp_path_factory):
    """A run of 6 steps with a checkpoint after 3."""
    run = trainer(tmp_path_factory.mktemp("six"))
    run.train()
    return run


def callback_of(run) -> DoprCallback:
    return next(each for each in run.callback_handler.callbacks if type(each) is DoprCallback)


def resumed(six_steps, folder, **changes):
    """Copy the checkpoint of step 3 into another output folder and resume there."""
    source = f"{six_steps.args.output_dir}/checkpoint-3"
    shutil.copytree(source, folder / "checkpoint-3")
    run = trainer(folder, **changes)
    run.train(resume_from_checkpoint=True)
    return run


def test_a_resumed_run_ends_with_the_same_weights(six_steps, tmp_path):
    run = resumed(six_steps, tmp_path)
    assert_equal(weights(run.model), weights(six_steps.model))


def test_a_preconditioner_attached_by_hand_gives_the_same_weights(six_steps):
    plain = trainer(six_steps.args.output_dir + "/plain", callbacks=[], save_strategy="no")
    plain.create_optimizer()
    ActivationPreconditioner(plain.model, **SETTINGS).attach(plain.optimizer)
    plain.train()
    assert_equal(weights(plain.model), weights(six_steps.model))


def test_without_the_callback_the_weights_differ(six_steps, tmp_path):
    plain = trainer(tmp_path, callbacks=[], save_strategy="no")
    plain.train()
    assert not torch.equal(
        plain.model.transformer.h[0].mlp.c_fc.weight,
        six_steps.model.transformer.h[0].mlp.c_fc.weight,
    )


@pytest.mark.parametrize(
    "changes",
    [
        {"gradient_accumulation_steps": 2},
        pytest.param({"data": examples(padded=True)}, marks=pytest.mark.slow),
        pytest.param({"gradient_checkpointing": True}, marks=pytest.mark.slow),
    ],
    ids=["accumulation", "padding", "checkpointing"],
)
def test_other_runs_resume_exactly_too(tmp_path, changes):
    run = trainer(tmp_path, max_steps=4, save_steps=2, **changes)
    run.train()
    again = trainer(tmp_path, max_steps=4, save_strategy="no", **changes)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert_equal(weights(again.model), weights(run.model))
    assert "steps: 4," in callback_of(run).summary()
    assert "steps: 4," in callback_of(again).summary()


def test_tokens_that_no_loss_scores_are_not_counted(tmp_path):
    callback = DoprCallback(gamma=0.1, refresh_every=4)
    changes = {"data": examples(padded=True), "max_steps": 2, "save_steps": 2}
    trainer(tmp_path, callbacks=[callback], **changes).train()
    state = torch.load(tmp_path / "checkpoint-2" / "dopr.pt")["preconditioner"]
    assert state["transformer.h.0.mlp.c_proj"]["count"] == 4 * (
        LENGTH // 2 - 1
    )  # of the step after the first refresh


def test_the_best_model_is_loaded_at_the_end(tmp_path):
    changes = {"eval_strategy": "steps", "eval_steps": 1, "save_steps": 1, "save_total_limit": 1}
    run = trainer(tmp_path, max_steps=3, load_best_model_at_end=True, **changes)
    run.train()
    saved = type(run.model).from_pretrained(run.state.best_model_checkpoint)
    assert_equal(weights(run.model), weights(saved))


def test_a_second_call_of_train_starts_with_new_statistics(tmp_path):
    run = trainer(tmp_path, max_steps=2, save_strategy="no")
    for _ in range(2):
        run.train()
        assert "steps: 2," in callback_of(run).summary()


def test_the_end_of_training_detaches_and_keeps_the_report(six_steps):
    callback = callback_of(six_steps)
    assert callback.preconditioner is None
    again = ActivationPreconditioner(six_steps.model, **SETTINGS)
    assert [row["name"] for row in again.report()] == [row["name"] for row in callback.report()]
    assert any(row["covered"] for row in callback.report())
    again.detach()


class Fails(TrainerCallback):
    def on_step_end(self, *args, **kwargs) -> None:
        raise KeyError("of the user")


def test_after_training_that_raised_detach_frees_the_model(tmp_path):
    model, callback, changes = gpt2(), DoprCallback(**SETTINGS), {"max_steps": 1}
    with pytest.raises(KeyError, match="of the user"):
        trainer(tmp_path, model=model, callbacks=[callback, Fails()], **changes).train()
    callback.detach()
    trainer(tmp_path, model=model, **changes).train()


def test_training_that_cannot_load_its_state_detaches(six_steps, tmp_path):
    model, other = gpt2(), DoprCallback(gamma=0.1, block_diagonal=4)
    with pytest.raises(ValueError, match="does not fit"):
        resumed(six_steps, tmp_path, model=model, callbacks=[other])
    trainer(tmp_path, model=model).train(resume_from_checkpoint=True)
    assert_equal(weights(model), weights(six_steps.model))


def test_a_checkpoint_in_another_folder_is_named_in_the_arguments(six_steps, tmp_path):
    source = f"{six_steps.args.output_dir}/checkpoint-3"
    run = trainer(tmp_path, save_strategy="no")
    with pytest.raises(FileNotFoundError, match="TrainingArguments"):
        run.train(resume_from_checkpoint=source)
    run = trainer(tmp_path, save_strategy="no", resume_from_checkpoint=source)
    run.train(resume_from_checkpoint=source)
    assert_equal(weights(run.model), weights(six_steps.model))


def test_true_in_the_arguments_means_the_last_checkpoint(six_steps, tmp_path):
    run = resumed(six_steps, tmp_path, resume_from_checkpoint=True)
    assert_equal(weights(run.model), weights(six_steps.model))


@pytest.mark.parametrize(
    "logging",
    [{}, pytest.param({"logging_strategy": "no"}, marks=pytest.mark.slow)],
    ids=["logged", "not logged"],
)
def test_the_state_of_another_run_is_refused(tmp_path, logging):
    changes = {"max_steps": 2, "save_steps": 1, **logging}
    trainer(tmp_path / "one", **changes).train()
    other = trainer(tmp_path / "two", learning_rate=1e-3, **changes)
    other.train()
    with pytest.raises(ValueError, match="not of the checkpoint from which training resumes"):
        other.train(resume_from_checkpoint=str(tmp_path / "one" / "checkpoint-1"))


def test_the_state_of_another_step_is_refused(tmp_path):
    changes = {"max_steps": 2, "save_steps": 1, "logging_strategy": "no"}
    trainer(tmp_path, **changes).train()
    run = trainer(tmp_path, resume_from_checkpoint=str(tmp_path / "checkpoint-2"), **changes)
    with pytest.raises(ValueError, match="not of the checkpoint from which training resumes"):
        run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


def test_a_callback_that_the_trainer_restores_resumes_exactly(tmp_path):
    # In JSON, settings of NumPy and sets become plain numbers and lists.
    settings = {**SETTINGS, "refresh_every": np.int64(2), "exclude": {"lm_head"}}
    whole = trainer(tmp_path, callbacks=[DoprCallback(**settings)])
    whole.train()
    changes = {"restore_callback_states_from_checkpoint": True, "save_strategy": "no"}
    given = DoprCallback(**settings)
    again = trainer(tmp_path, callbacks=[given], **changes)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert callback_of(again) is not given
    assert "steps: 6," in callback_of(again).summary()
    assert_equal(weights(again.model), weights(whole.model))


def test_a_checkpoint_without_a_state_is_refused(tmp_path):
    trainer(tmp_path, callbacks=[], max_steps=1, save_steps=1).train()
    with pytest.raises(FileNotFoundError, match="saved with DoprCallback"):
        trainer(tmp_path, max_steps=2).train(resume_from_checkpoint=True)


@pytest.mark.parametrize(
    ("changes", "cure"),
    [
        ({"mixed_precision": "fp16"}, "bf16=True"),
        ({"distributed_type": DistributedType.DEEPSPEED}, "DEEPSPEED.*use DDP or FSDP2"),
        ({"distributed_type": DistributedType.FSDP}, "FSDP1.*fsdp_version"),
        ({"n_gpu": 2}, "torchrun"),
    ],
)
def test_training_that_does_not_fit_is_refused_with_a_cure(changes, cure):
    fits = {"mixed_precision": "bf16", "distributed_type": DistributedType.NO, "n_gpu": 1}
    fits["is_fsdp2"] = False
    check_supported(SimpleNamespace(**fits), SimpleNamespace(**fits))
    with pytest.raises(ValueError, match=cure):
        check_supported(SimpleNamespace(**fits | changes), SimpleNamespace(**fits | changes))


@pytest.mark.slow  # two processes import everything
def test_two_processes_have_the_same_weights_and_resume_up_to_rounding(tmp_path):
    program = ["-m", "tests.optim.integrations.ddp_trainer", str(tmp_path)]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run([*torchrun, *program], capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    zero, one = (torch.load(tmp_path / f"{rank}-of-2.pt") for rank in (0, 1))
    assert_equal(zero, one)
