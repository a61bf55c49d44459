"""bench/step_overhead.py: its turns, and that compiled variants stay compiled."""

from functools import partial

import pytest
import torch
import torch._dynamo.testing

from bench.step_overhead import PRESETS, StepVariant, in_turns, make_optimizers, modes

TINY = PRESETS["tiny"]


def variant(width, dopr, preset=TINY):
    return StepVariant(preset, width, partial(make_optimizers, optimizer="adamw", dopr=dopr))


@pytest.mark.slow
def test_dynamo_compiles_every_variant_of_several_widths(monkeypatch):
    """Dynamo runs a code that it compiled eight times eagerly, unless the limit is raised."""
    counter, compile_model = torch._dynamo.testing.CompileCounter(), torch.compile
    monkeypatch.setattr(torch, "compile", lambda model: compile_model(model, backend=counter))
    preset = TINY._replace(compile_in_bf16=True)
    n = 0
    for width in (8, 16):
        for dopr in modes(preset, width, "cholesky").values():
            before = counter.frame_count
            variant(width, dopr, preset)
            n += counter.frame_count > before
    assert n > 8


def test_variants_take_turns_of_one_step(monkeypatch):
    order = []
    variants = {name: variant(8, None) for name in ("a", "b")}
    for name, each in variants.items():
        monkeypatch.setattr(each, "step", partial(order.append, name))
    row = in_turns(variants, rounds=2)
    assert order == ["a", "b"] * 2 * TINY.refresh_every
    assert row["ratio"]["a"] == 1
