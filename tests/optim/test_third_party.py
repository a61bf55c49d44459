"""Classes of torch.optim and pytorch_optimizer: found, given arguments, and trained, or refused."""

import pytest
import pytorch_optimizer
import torch

from model import GPT, GPTConfig
from optim import ActivationPreconditioner, Muon
from optim.build import OPTIMIZERS, build_optimizers, describe_groups, third_party
from optim.third_party import argument_names, default_lr, find, known_names

NUMBERS = {"beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "momentum": 0.95, "weight_decay": 0.1}
REFUSED = {  # the reason, in part
    **dict.fromkeys(("adalomo", "adammini", "lomo"), "is built from 'model'"),
    "magma": "is built from 'optimizer'",
    "lbfgs": "evaluates the loss several times in a step through a closure",
    "alig": "has no argument lr",
    **dict.fromkeys(
        ("a2grad", "adamg", "apollodqn", "rprop", "pytorch_optimizer:AdaFactor"),
        "does not use the learning rate of every step",
    ),
    **dict.fromkeys(("madgrad", "spam", "stablespam"), "keeps state that belongs to no parameter"),
    **dict.fromkeys(("galore", "fira", "apollo"), "without a rank in its param groups"),
    **dict.fromkeys(("adahessian", "sophiah"), "does not require grad"),
    **dict.fromkeys(("emofact", "emolynx", "emonavi"), "uses the loss that a closure returns"),
    "bsam": "needs num_data; add it to optimizer_args",
    "ranger21": "needs num_iterations; add it to optimizer_args",
    **dict.fromkeys(("demo", "distributedmuon"), "Default process group has not been init"),
    "sparseadam": "does not support dense gradients",
    "lorarite": "changes no weight in 12 steps",
    **dict.fromkeys(
        ("adashift", "conda", "scalableshampoo", "scion", "scionlight"),
        "is not made of tensors and numbers",
    ),
}
OTHERS = [name for name in known_names() if name not in OPTIMIZERS]


HIDDEN = {*(f"torch:{name}" for name in ("AdamW", "Muon", "SGD"))}  # behind ours and torch's
HIDDEN |= {
    f"pytorch_optimizer:{name}"
    for name in (
        "Adam",
        "AdamW",
        "Muon",
        "AdaMuon",
        "SGD",
        "NAdam",
        "RAdam",
        "RMSprop",
        "AdaFactor",
    )
}
CLASSES = [*OTHERS, *sorted(HIDDEN)]
QUICK = {  # in `make test`; all others are in `make test-full`
    *(
        "adabelief",
        "adafactor",
        "ademamix",
        "adopt",
        "came",
        "kron",
        "lamb",
        "lion",
        "mars",
        "nadam",
    ),
    *("normuon", "prodigy", "schedulefreeadamw", "shampoo", "soap", "splus", "torch:Muon"),
    *("adahessian", "alig", "emonavi", "galore", "lbfgs", "lomo", "madgrad", "ranger21", "rprop"),
    *("scion", "sparseadam", "stablespam"),
}


class Inherited(torch.optim.AdamW):
    def __init__(self, params, **kwargs):
        super().__init__(params, **kwargs)


def gpt() -> GPT:
    torch.manual_seed(0)
    sizes = {"vocab_size": 11, "block_size": 8, "n_layer": 1, "n_head": 2, "n_embd": 8}
    return GPT(GPTConfig(**sizes, bias=False, tie_weights=False))


def build(model, name, **changes):
    third = find(name, changes.get("optimizer_args", ""))
    settings = NUMBERS | {"optimizer": name, "lr": third.default_lr} | changes
    return build_optimizers(model, **settings)


def train(model, optimizers, steps=12):
    idx = torch.arange(8).repeat(4, 1)
    for _ in range(steps):
        _, loss = model(idx, idx)
        loss.backward()
        for each in optimizers:
            each.step()
            each.zero_grad()
    return loss.item()


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[] if name in QUICK else [pytest.mark.slow]) for name in CLASSES],
)
def test_every_class_trains_behind_dopr_or_is_refused_with_its_reason(name):
    model = gpt()
    if name in REFUSED:
        with pytest.raises(ValueError, match=REFUSED[name]):
            build(model, name)
        return
    before = model.transformer.h[0].mlp.c_fc.weight.detach().clone()
    optimizers = build(model, name)
    held = [p for each in optimizers for group in each.param_groups for p in group["params"]]
    assert len(held) == len(set(held)) == len(list(model.parameters()))
    dopr = ActivationPreconditioner(model, gamma=0.1).attach(*optimizers)
    first = train(model, optimizers, steps=1)
    assert train(model, optimizers, steps=11) < 1.02 * first  # a few begin slowly
    assert not torch.equal(model.transformer.h[0].mlp.c_fc.weight, before)
    assert {layer.n_refreshes for layer in dopr.layers} == {12}


def test_the_refused_classes_exist():
    assert REFUSED.keys() < {*CLASSES}
    assert len(OTHERS) > 120


def test_a_class_is_the_same_as_built_by_hand():
    model, twin = gpt(), gpt()
    changes = {"optimizer_args": "betas=(0.8, 0.9), foreach=True", "weight_decay": 0.0}
    ours = build(model, "lion", lr=1e-3, **changes)
    theirs = pytorch_optimizer.Lion(twin.parameters(), lr=1e-3, betas=(0.8, 0.9), foreach=True)
    train(model, ours)
    train(twin, [theirs])
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(a, b)


def test_names_lead_to_classes():
    assert find("nadam").kind is find("torch:NAdam").kind is torch.optim.NAdam
    assert find("torch:muon").kind is find("torch.optim:Muon").kind is torch.optim.Muon
    assert find("soap").kind is find("pytorch_optimizer:soap").kind is pytorch_optimizer.SOAP
    assert find("optim:Muon", "momentum=0.9").kind is Muon
    assert third_party("adamw") is third_party("muon") is None


def test_arguments_are_python_with_lower_case_words():
    given = "betas=(0.9, 0.95), weight_decouple=false, foreach=none,eps=1e-6"
    found = find("adopt", given).arguments
    assert found == {
        **{"betas": (0.9, 0.95), "weight_decouple": False},
        **{"foreach": None, "eps": 1e-6},
    }
    assert find("lion").arguments == {}
    assert find("lion", "betas=(0.9, none)").arguments == {"betas": (0.9, None)}


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("soup", "", "no optimizer has this name; did you mean 'soap'"),
        ("torch:adamx", "", "torch.optim has no class 'adamx'; did you mean 'Adam"),
        ("no_such.package:Lion", "", "no_such.package cannot be imported"),
        ("torch.nn:Linear", "", "Linear is not a torch.optim.Optimizer"),
        ("pytorch_optimizer:Lookahead", "", "is built from 'optimizer', not from parameters"),
        ("pytorch_optimizer:SAM", "", "has no argument lr.*wrappers"),
        ("lion", "beta=(0.9, 0.99)", "Lion has no argument 'beta'; did you mean 'betas'"),
        ("lion", "lr=0.1", "lr cannot be given here, use lr"),
        ("lion", "weight_decay=0.1", "use weight_decay"),
        ("lion", "0.9", "must be written as name=value"),
        ("lion", "betas=(0.9", "must be written as name=value"),
        ("lion", "betas=open('x')", "must be written as name=value"),
        ("lion", "betas=(0.9, 2.0)", "Lion fails on three small parameters"),
        ("lion", "**{}", "must be written as name=value"),
        ("lion", "betas={[]:1}", "must be written as name=value"),
        ("lion", "betas=(0.8,0.9))(foreach=True", "must be written as name=value"),
        ("torch:muon", "adjust_lr_fn=original", "with text in quotes"),
        ("lion", "foreach=true, foreach=false", "a name is given twice"),
        ("AdamW", "", "write adamw for ours.*or torch:AdamW"),
        (".nothing:Foo", "", "cannot be imported from here"),
    ],
)
def test_bad_input_is_refused_with_a_remedy(name, arguments, message):
    with pytest.raises(ValueError, match=message):
        third_party(name, arguments)


def test_without_pytorch_optimizer_the_message_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pytorch_optimizer", None)
    with pytest.raises(ValueError, match="not installed: pip install pytorch_optimizer"):
        find("lion")
    assert find("nadam").kind is torch.optim.NAdam


@pytest.mark.parametrize(
    ("name", "roles", "expected"),
    [
        ("torch:muon", "auto", {"matrix"}),
        ("normuon", "auto", {"matrix"}),
        ("lion", "matrices", {"matrix"}),
        ("lion", "auto", {"matrix", "embedding", "head", "gain"}),
        ("normuon", "all", {"matrix", "embedding", "head", "gain"}),
    ],
)
def test_roles_are_divided_as_asked(name, roles, expected):
    main, *aux = build(
        gpt(), name, optimizer_roles=roles, aux_lr=0.01 if len(expected) == 1 else None
    )
    assert {group["role"] for group in main.param_groups} == expected
    assert {group["role"] for each in aux for group in each.param_groups} == (
        {"matrix", "embedding", "head", "gain"} - expected
    )
    assert [type(each) for each in aux] == ([torch.optim.AdamW] if aux else [])
    assert all(group["use_muon"] == (group["role"] == "matrix") for group in main.param_groups)


def test_a_class_of_matrices_only_does_not_take_vectors():
    with pytest.raises(ValueError, match=r"Muon fails on three small parameters.*2D"):
        build(gpt(), "torch:muon", optimizer_roles="all")


def test_weight_decay_goes_where_it_belongs():
    (optimizer,) = build(gpt(), "soap")
    for group in optimizer.param_groups:
        assert group["weight_decay"] == (0.0 if group["role"] == "gain" else 0.1)
    (optimizer,) = build(gpt(), "sm3")
    assert all("weight_decay" not in group for group in optimizer.param_groups)
    table = describe_groups([optimizer]).splitlines()
    assert table[1].split()[-3:] == ["0.1", "none", "1"]


def test_default_rates_are_the_classes_own():
    assert (default_lr("lion"), default_lr("soap"), default_lr("prodigy")) == (1e-4, 3e-3, 1.0)
    assert default_lr("a2grad") == 1e-3  # it has none
    assert default_lr(f"{__name__}:Inherited") == 1e-3  # of torch's AdamW
    assert {"betas", "weight_decouple"} <= {*argument_names("adabelief")}
    assert "lr" not in argument_names("adabelief")
