"""Classes of other packages in train.py: resumed bit for bit, evaluated at the right weights."""

import signal
from itertools import product

import pytest
import torch
from safetensors.torch import load_file

import train
from tests.test_train import losses, request_stop_after
from tests.tiny import argv, metrics, weights
from trainer.checkpoint.read import open_checkpoint

FREE = {"optimizer": "schedulefreeadamw", "schedule": "constant"}
VARIANTS = {
    "soap": {"optimizer": "soap", "optimizer_args": "precondition_frequency=3", "dopr": True},
    "kron draws random numbers": {"optimizer": "kron"},
    "prodigy changes its param groups": {"optimizer": "prodigy", "lr": 1.0},
    "mars": {"optimizer": "mars", "ema_decay": 0.9},
    "torch's muon": {"optimizer": "torch:muon"},
    "two sets of weights": FREE | {"dopr": True},
    "splus keeps an average": {"optimizer": "splus", "lr": 0.1},
}


QUICK = {  # in `make test`
    ("soap", "full"),
    ("kron draws random numbers", "full"),
    ("prodigy changes its param groups", "full"),
    ("two sets of weights", "sharded"),
}


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        pytest.param(*case, marks=[] if case in QUICK else [pytest.mark.slow])
        for case in product(VARIANTS, ["full", "sharded"])
    ],
)
def test_a_run_resumed_twice_equals_an_uninterrupted_one_bit_for_bit(dataset, tmp_path, name, kind):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    changes = VARIANTS[name] | {"checkpoint_format": kind, "max_steps": 10}
    assert train.main(argv(dataset, whole, **changes)) == 0
    for stop_after in (3, 7):
        with pytest.MonkeyPatch.context() as patch:
            request_stop_after(patch, stop_after)
            assert train.main(argv(dataset, parts, **changes)) == 128 + signal.SIGTERM
    assert train.main(argv(dataset, parts, **changes)) == 0
    assert losses(parts) == losses(whole)
    a, b = (open_checkpoint(out).model for out in (parts, whole))
    assert all(torch.equal(read(a[key]), read(b[key])) for key in a.keys() | b.keys())


def read(tensor):
    return tensor if isinstance(tensor, torch.Tensor) else tensor.read()


@pytest.mark.parametrize("optimizer", [FREE, VARIANTS["splus keeps an average"]])
def test_evaluation_changes_no_bit_of_the_training(dataset, tmp_path, optimizer):
    for name, every in (("often", 1), ("seldom", 100)):
        changes = optimizer | {"eval_every": every, "save_every": every}
        assert train.main(argv(dataset, tmp_path / name, **changes)) == 0
    train_losses = [
        [row["loss"] for row in metrics(tmp_path / name, "train")] for name in ("often", "seldom")
    ]
    assert train_losses[0] == train_losses[1]
    assert weights(tmp_path / "often", 12) == weights(tmp_path / "seldom", 12)


def is_average(x, state):
    y = 0.9 * x + 0.1 * state["z"]
    return torch.allclose(y, state["train_weight"], rtol=1e-5, atol=1e-7)


def test_schedule_free_weights_are_saved_and_validated_as_their_average(dataset, tmp_path):
    """With β₁ = 0.9, the weights y of the gradient are 0.9 x + 0.1 z; x is saved."""
    assert train.main(argv(dataset, tmp_path, **FREE, max_steps=8)) == 0
    checkpoint = open_checkpoint(tmp_path)
    x = load_file(tmp_path / "checkpoints/step-00000008/model.safetensors")
    (states,) = checkpoint.train["optimizers"]
    assert len(states) == len(x) > 9
    left = [*states.values()]
    for key, weight in x.items():  # each weight is the average of exactly one state
        fitting = [v for v in left if v["z"].shape == weight.shape and is_average(weight, v)]
        assert len(fitting) == 1, key
        left = [v for v in left if v is not fitting[0]]
        assert not torch.equal(weight, fitting[0]["train_weight"]), key


def test_another_class_of_the_same_name_does_not_continue_a_run(dataset, tmp_path, capsys):
    changes = {"optimizer": "muon", "max_steps": 4}
    assert train.main(argv(dataset, tmp_path, **changes)) == 0
    assert train.main(argv(dataset, tmp_path, **changes | {"optimizer": "torch:muon"})) == 1
    assert "was written with optimizers ['Muon', 'AdamW']" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optimizer": "soup"}, "did you mean 'soap'"),
        ({"optimizer": "lion", "optimizer_args": "beta=1"}, "did you mean 'betas'"),
        ({"optimizer": "lbfgs"}, "through a closure"),
        ({"optimizer": "lion", "beta1": 0.8}, "beta1=0.8: has no effect on optimizer=lion"),
        ({"optimizer": "torch:muon", "momentum": 0.8}, "momentum=0.8: has no effect on optim"),
        ({"optimizer": "lion", "aux_lr": 0.1}, "aux_lr=0.1: optimizer=lion has no auxiliary"),
        ({"optimizer": "soap", "mup": True}, "its muP rule is not known"),
        ({"optimizer": "soap", "parallel": "fsdp"}, "use parallel=ddp"),
        ({"optimizer": ""}, "optimizer='': "),
    ],
)
def test_what_cannot_be_trained_is_refused_before_any_work(
    dataset, tmp_path, capsys, changes, message
):
    assert train.main(argv(dataset, tmp_path / "run", **changes)) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_setting_of_the_adamw_beside_a_class_is_used(dataset, tmp_path):
    changes = {"optimizer": "torch:muon", "max_steps": 3, "aux_lr": 1e-2}
    for name, beta1 in (("a", 0.9), ("b", 0.5)):
        assert train.main(argv(dataset, tmp_path / name, **changes, beta1=beta1)) == 0
    assert weights(tmp_path / "a", 3) != weights(tmp_path / "b", 3)


@pytest.mark.parametrize("optimizer", ["torch:sgd", "torch:adamw"])
def test_torchs_own_classes_resume_with_their_defaults(dataset, tmp_path, optimizer):
    args = {} if optimizer == "torch:sgd" else {"optimizer_args": "amsgrad=true"}
    changes = {"optimizer": optimizer, "lr": 1e-2, **args}
    for out, steps in (("whole", [8]), ("parts", [4, 8])):
        for n in steps:
            more = changes | {"max_steps": n, "schedule": "constant"}
            assert train.main(argv(dataset, tmp_path / out, **more)) == 0
    assert weights(tmp_path / "parts", 8) == weights(tmp_path / "whole", 8)


def test_mup_scales_a_class_like_adamw(dataset, tmp_path):
    changes = {"max_steps": 4, "mup": True, "mup_base_width": 8, "weight_decay": 0.1}
    shared = {"optimizer_args": "betas=(0.9,0.95),eps=1e-8,fused=true"}
    assert train.main(argv(dataset, tmp_path / "a", **changes, optimizer="adamw")) == 0
    assert (
        train.main(argv(dataset, tmp_path / "b", **changes, optimizer="torch:adamw", **shared)) == 0
    )
    assert weights(tmp_path / "a", 4) == weights(tmp_path / "b", 4)
