"""Every invalid setting is named, with its value and the valid values."""

import copy
import math
import pickle

import numpy as np
import pytest

from optim import ActivationPreconditioner
from optim.dopr.settings import settings_problems
from tests.optim.models import mlp

GOOD = {
    "gamma": 0.1,
    "sigma_beta": None,
    "refresh_every": 4,
    "collect_every": 2,
    "token_stride": 1,
    "exponent": 1,
    "inverse": "cholesky",
    "trace_normalized": True,
    "block_diagonal": None,
    "embeddings": False,
    "backend": "torch",
}
BAD = {
    "gamma": [-0.1, math.inf, math.nan, "0.1", None, [0.1]],
    "sigma_beta": [-0.1, 1.0, math.nan, "0.9", True],
    "refresh_every": [0, 2.0, "4", None],
    "collect_every": [-1, 1.5, True],
    "token_stride": [0, 0.5, "1"],
    "exponent": [0, 3, 2.0, "1"],
    "inverse": ["qr", "", None],
    "block_diagonal": [0, 2.5, "4"],
    "trace_normalized": ["false", 1],
    "embeddings": ["no", None],
    "backend": ["cuda", "", None],
}


def test_good_settings_have_no_problem():
    assert settings_problems(GOOD) == []
    ActivationPreconditioner(mlp(), **GOOD)


@pytest.mark.parametrize(("key", "value"), [(k, v) for k, vs in BAD.items() for v in vs])
def test_a_bad_setting_is_named_with_its_value(key, value):
    with pytest.raises(ValueError, match=rf"^{key}=.*must be") as error:
        ActivationPreconditioner(mlp(), **GOOD | {key: value})
    assert str(value) in str(error.value)
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("value", "shown"), [("0.1", r"'0.1' \(str\)"), (None, r"None \(NoneType\)")]
)
def test_a_gamma_that_is_no_number_is_named_with_its_type(value, shown):
    with pytest.raises(ValueError, match=f"gamma={shown}: must be a finite number"):
        ActivationPreconditioner(mlp(), gamma=value)


def test_all_bad_settings_are_named_at_once():
    with pytest.raises(ValueError, match="gamma") as error:
        ActivationPreconditioner(mlp(), **{key: values[0] for key, values in BAD.items()})
    assert [line.split("=")[0] for line in str(error.value).splitlines()] == list(BAD)


def test_collecting_out_of_step_with_refreshes_is_refused():
    with pytest.raises(ValueError, match="collect_every=3: must divide refresh_every=4"):
        ActivationPreconditioner(mlp(), **GOOD | {"collect_every": 3})


def test_embeddings_need_damping():
    with pytest.raises(ValueError, match="gamma=0 with embeddings"):
        ActivationPreconditioner(mlp(), **GOOD | {"gamma": 0.0, "embeddings": True})


def test_numbers_of_numpy_are_settings_and_stored_as_plain_ones():
    numbers = {"gamma": np.float32(0.5), "refresh_every": np.int64(4), "exponent": np.int32(2)}
    preconditioner = ActivationPreconditioner(mlp(), **GOOD | numbers)
    settings = preconditioner.settings
    stored = (settings.gamma, settings.refresh_every, settings.exponent)
    assert stored == (0.5, 4, 2)
    assert [type(value) for value in stored] == [float, int, int]
    made_with = preconditioner.state_dict()["0"]["made_with"]
    assert {type(value) for value in made_with.values()} <= {float, int, bool}


@pytest.mark.parametrize("model", [None, mlp, mlp().state_dict()])
def test_what_is_no_model_is_named(model):
    with pytest.raises(TypeError, match=f"model is a {type(model).__name__}, but must be a torch"):
        ActivationPreconditioner(model, gamma=0.1)


@pytest.mark.parametrize("key", ["include", "exclude"])
def test_patterns_are_names(key):
    with pytest.raises(ValueError, match=rf"{key}=\[0\]: must be a list of strings"):
        ActivationPreconditioner(mlp(), gamma=0.1, **{key: [0]})


@pytest.mark.parametrize("copied", [copy.deepcopy, copy.copy, pickle.dumps])
def test_a_preconditioner_is_not_copied(copied):
    preconditioner = ActivationPreconditioner(mlp(), gamma=0.1)
    with pytest.raises(TypeError, match="belongs to its model and cannot be copied or pickled"):
        copied(preconditioner)
