"""Every weight is either covered or reported with the reason why it is not."""

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm
from transformers.pytorch_utils import Conv1D

from optim import ActivationPreconditioner
from optim.dopr.coverage import Selection, find_layers
from tests.optim.models import mlp, randn


def found(model, include=None, exclude=None, embeddings=False):
    """Return what find_layers returns for these arguments of ActivationPreconditioner."""
    return find_layers(model, Selection(include, exclude, embeddings))


class Doubled(nn.Linear):
    def forward(self, input):
        return 2 * super().forward(input)


class DoubledConv(nn.Conv2d):
    def forward(self, input):
        return 2 * super().forward(input)


class Shifted(nn.Embedding):
    def forward(self, input):
        return super().forward(input + 1)


def frozen(module):
    return module.requires_grad_(False)


def replaced(module):
    module.forward = lambda x: x
    return module


UNCOVERED = [
    (frozen(nn.Linear(2, 2)), "frozen"),
    (replaced(nn.Linear(2, 2)), "its forward was replaced"),
    (Doubled(2, 2), "usual forward"),
    (DoubledConv(2, 2, 1), "usual forward"),
    (Shifted(3, 2), "usual forward"),
    (nn.Bilinear(2, 2, 2), "usual forward"),
    (nn.Conv1d(2, 2, 1), "usual forward"),
    (nn.ConvTranspose2d(2, 2, 1), "usual forward"),
    (nn.Conv2d(2, 2, 1, groups=2), "groups"),
    (nn.Conv2d(2, 2, 3, padding="same"), "padding='same'/'valid'"),
    (nn.Conv2d(2, 2, 3, padding=1, padding_mode="reflect"), "a padding_mode other than 'zeros'"),
    (nn.Embedding(3, 2, sparse=True), "sparse"),
    (nn.Embedding(3, 2, max_norm=1.0), "max_norm"),
    (nn.Embedding(3, 2, scale_grad_by_freq=True), "scale_grad_by_freq"),
    (weight_norm(nn.Linear(2, 2)), "not the weight of a linear layer"),
    (nn.GRU(2, 2), "not the weight of a linear layer"),
]


@pytest.mark.parametrize(("module", "reason"), UNCOVERED, ids=lambda x: type(x).__name__)
def test_a_weight_that_cannot_be_covered_has_a_reason(module, reason):
    model = nn.ModuleDict({"odd": module, "plain": nn.Linear(2, 2)})
    covered, reasons = found(model, embeddings=True)
    assert [layer.name for layer in covered] == ["plain"]
    matrices = [name for name, p in module.named_parameters() if p.dim() >= 2]
    assert list(reasons) == [f"odd.{name}" for name in matrices]
    assert all(reason in each for each in reasons.values())


def test_embeddings_are_covered_on_request_only():
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 3))
    assert [layer.name for layer in found(model)[0]] == ["1"]
    assert [layer.name for layer in found(model, embeddings=True)[0]] == ["0", "1"]


def test_tied_weights_are_left_alone_under_both_names():
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 4), nn.Linear(4, 5, bias=False))
    model[2].weight = model[0].weight
    preconditioner = ActivationPreconditioner(model, gamma=0.1, embeddings=True)
    rows = {row["name"]: row for row in preconditioner.report()}
    assert [name for name, row in rows.items() if row["covered"]] == ["1.weight"]
    for name in ("0.weight", "2.weight"):
        assert "tied" in rows[name]["reason"]
        assert rows[name]["shape"] == (5, 4)


def test_a_module_shared_under_two_names_is_covered_once():
    layer = nn.Linear(4, 4)
    assert [each.name for each in found(nn.Sequential(layer, layer))[0]] == ["0"]


def test_multihead_attention_is_left_alone_and_the_rest_of_a_transformer_covered():
    model = nn.TransformerEncoderLayer(8, 2, 16)
    covered, reasons = found(model)
    assert [layer.name for layer in covered] == ["linear1", "linear2"]
    assert "MultiheadAttention" in reasons["self_attn.out_proj.weight"]
    assert "self_attn.in_proj_weight" in reasons


def test_shapes_of_features_are_those_of_a_linear_layer():
    model = nn.ModuleList([nn.Linear(3, 2), Conv1D(2, 3), nn.Conv2d(3, 2, (4, 5))])
    covered, _ = found(model)
    assert [layer.d_in for layer in covered] == [3, 3, 60]
    assert [tuple(layer.as_matrix(layer.weight).shape) for layer in covered] == [
        (2, 3),
        (2, 3),
        (2, 60),
    ]


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("module", [nn.Linear(3, 2), Conv1D(2, 3), nn.Conv2d(3, 2, (4, 5))])
def test_what_is_written_as_a_matrix_is_read_as_a_matrix(module, memory_format):
    if isinstance(module, nn.Conv2d):
        module = module.to(memory_format=memory_format)
    (layer,), _ = found(module)
    target = torch.zeros_like(layer.weight)
    matrix = randn(2, layer.d_in, seed=1)
    layer.write(matrix, target)
    assert torch.equal(layer.as_matrix(target), matrix)


# -- include and exclude


def nested():
    return nn.ModuleDict({"block": mlp(), "head": nn.Linear(5, 3), "table": nn.Embedding(4, 3)})


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        ({"include": ["block.*"]}, ["block.0", "block.2"]),
        ({"include": ["block.?"], "exclude": ["*.0"]}, ["block.2"]),
        ({"exclude": ["head"]}, ["block.0", "block.2"]),
        ({"include": ["*"], "exclude": ["table"]}, ["block.0", "block.2", "head"]),
    ],
)
def test_include_and_exclude_choose_by_name(patterns, expected):
    covered, reasons = found(nested(), **patterns)
    assert [layer.name for layer in covered] == expected
    assert len(covered) + len(reasons) == 4


@pytest.mark.parametrize("key", ["include", "exclude"])
@pytest.mark.parametrize("pattern", ["haed", "block", "block.1"])
def test_a_pattern_that_matches_no_weight_is_refused(key, pattern):
    with pytest.raises(ValueError, match=rf"'{pattern}' matches no module.*block\.0, block\.2"):
        found(nested(), **{key: ["*", pattern] if key == "exclude" else [pattern]})


def test_including_what_cannot_be_covered_is_refused_with_the_reason():
    with pytest.raises(ValueError, match=r"include names table\.weight.*embeddings=False"):
        found(nested(), include=["head", "table"])
    with pytest.raises(ValueError, match="table"):
        found(nested(), include=["head", "table.weight"])


def test_a_wildcard_covers_what_can_be_and_says_why_the_rest_is_not():
    model = nn.ModuleDict({"wte": nn.Embedding(5, 4), "proj": nn.Linear(4, 4)})
    model["head"], model["mix"] = nn.Linear(4, 5, bias=False), nn.Bilinear(4, 4, 4)
    model["head"].weight = model["wte"].weight
    covered, reasons = found(model, include=["*"], embeddings=True)
    assert [layer.name for layer in covered] == ["proj"]
    assert "tied" in reasons["wte.weight"]
    assert "tied" in reasons["head.weight"]
    assert "usual forward" in reasons["mix.weight"]
    with pytest.raises(
        ValueError, match=r"include names head\.weight, which cannot be preconditioned: tied"
    ):
        found(model, include=["p*", "head"])


@pytest.mark.parametrize("key", ["include", "exclude"])
def test_a_bare_string_for_a_list_of_names_is_refused(key):
    with pytest.raises(ValueError, match=rf"{key}='head': must be a list .* write \['head'\]"):
        found(nested(), **{key: "head"})


def test_a_lazy_layer_is_refused_until_it_has_a_shape():
    model = nn.Sequential(nn.Linear(3, 4), nn.LazyLinear(2))
    with pytest.raises(ValueError, match=r"1\.weight has no shape yet .* run one batch"):
        found(model)
    model(torch.ones(1, 3))
    assert [layer.name for layer in found(model)[0]] == ["0", "1"]


def test_a_model_with_nothing_to_cover_is_refused_with_all_reasons():
    with pytest.raises(ValueError, match=r"0\.weight: an embedding.*1\.weight: frozen"):
        found(nn.Sequential(nn.Embedding(3, 2), frozen(nn.Linear(2, 2))))
    with pytest.raises(ValueError, match="no weights"):
        found(nn.LayerNorm(4))


def test_a_refused_model_is_left_untouched():
    model = nested()
    with pytest.raises(ValueError, match="matches no module"):
        ActivationPreconditioner(model, gamma=0.1, exclude=["haed"])
    assert not any("forward" in vars(module) for module in model.modules())


def test_a_second_preconditioner_on_the_same_model_is_refused():
    model = mlp()
    ActivationPreconditioner(model, gamma=0.1)
    with pytest.raises(ValueError, match="another preconditioner"):
        ActivationPreconditioner(model, gamma=0.1)
