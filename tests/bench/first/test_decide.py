"""The rules of the GPU protocol, applied to results that were made up."""

import json
import math

import pytest

from bench.first.decide import decide, read_results, report
from bench.pretraining import FRESH_SEEDS
from bench.results import write_rows


def decisions(**rows):
    """Return what follows by question, from the rows of each step."""
    results = {name: {"environment": {}, "rows": each} for name, each in rows.items()}
    return {each.question: each for each in decide(results)}


def test_questions_without_rows_are_not_measured():
    found = decisions(correctness=[], loop=[{"tokens_per_s": {"ours": 1.0}}])
    assert len(found) > 5
    assert {(each.measured, each.follows) for each in found.values()} == {("not measured", "-")}


def test_a_wrong_kernel_is_to_be_mended_first():
    rows = [{"case": "gram a", "is_right": True}, {"case": "gram b", "is_right": False}]
    question = "kernels against float64"
    assert decisions(correctness=rows[:1])[question].follows == "none wrong"
    wrong = decisions(correctness=rows)[question]
    assert wrong[1:] == ("1 of 2 cases are right", "mend first: gram b")


@pytest.mark.parametrize(
    ("ratio", "error", "chosen"),
    [
        *((0.8, 1e-6, "Triton"), (1.2, 1e-6, "torch")),
        *((0.8, 1e-2, "torch"), (0.8, math.nan, "torch")),
    ],
)
def test_a_kernel_is_chosen_where_it_is_faster_than_torch_and_accurate(ratio, error, chosen):
    row = {"case": "apply N=12 m=768", "error": {"triton tf32x3": error}}
    row["ratio"] = {"bmm": 1.0, "layer by layer": 2.0, "triton tf32x3": 2.0 * ratio}
    found = decisions(kernels_apply=[row])["apply N=12 m=768"]
    assert found.follows.endswith(chosen)
    assert found.measured.startswith(f"x {ratio:.2f} ms of torch")


def turn(contender, ms, *, call=1, number=0, optimizer="muon"):
    row = {"call": call, "round": number, "optimizer": optimizer, "contender": contender}
    return row | {"step_ms": ms, "MiB": 1000.0}


def test_steps_are_compared_with_the_base_of_their_optimizer_call_and_round():
    rows = [
        *(turn("base", 100.0), turn("sampled", 105.0), turn("base", 200.0, number=1)),
        *(turn("sampled", 230.0, number=1), turn("base", 400.0, call=2)),
        turn("exact", 600.0, call=2),
        *(turn("sampled", 1.0, number=2), turn("base", 10.0, optimizer="adamw")),
        turn("sampled", 12.0, optimizer="adamw"),
    ]
    found = decisions(steps=rows)
    assert found["step of muon, sampled"].follows == "bar of 1.10 met"
    assert "x 1.100" in found["step of muon, sampled"].measured
    assert "x 1.500" in found["step of muon, exact"].measured
    assert found["step of muon, exact"].follows == "no bar"
    assert found["step of adamw, sampled"].follows == "bar of 1.10 missed"


def test_a_base_alone_decides_nothing():
    found = decisions(steps=[turn("sampled", 1.0)])
    assert found["step of GPT-2 124M"].measured == "not measured"


def test_what_raised_an_exception_is_listed_once_and_compared_with_nothing():
    text = {"exception": "OutOfResources: shared memory\nmore"}
    keys = {"call": 1, "optimizer": "muon", "contender": "exact"}
    rows = [turn("base", 100.0), *(keys | text | {"round": number} for number in range(2))]
    found = decisions(steps=rows, kernels_gram=[{"case": "gram a"} | text])
    for question in ("step of muon, exact", "gram a"):
        assert found[question][1:] == ("OutOfResources: shared memory", "mend it, then repeat")
    results = {"steps": {"environment": {}, "rows": rows}}
    assert [each.question for each in decide(results)].count("step of muon, exact") == 1
    assert "x 1.000" in found["step of muon, base"].measured


@pytest.mark.parametrize(("ratio", "says"), [(1.0, "met"), (0.999, "missed")])
def test_the_loop_is_as_fast_as_nanogpts_or_not(ratio, says):
    assert decisions(loop=[{"ratio": ratio}])["our loop against nanoGPT's"].follows.endswith(says)


@pytest.mark.parametrize(("ratio", "says"), [(0.99, "keep it"), (1.0, "remove it")])
def test_a_head_over_whole_tiles_stays_if_it_is_faster(ratio, says):
    rows = [{"ratio": {"as it is": 1.0, "whole tiles": ratio}}]
    assert decisions(head=rows)["head over whole tiles"].follows == says


def runs(variant, losses, ms):
    """Return the rows of a variant on the fresh seeds; a loss of None is a diverged run."""
    return [
        {"variant": variant, "lr": 1e-3, "seed": seed, "loss": loss, "step_ms": ms}
        | {"has_diverged": loss is None}
        for seed, loss in zip(FRESH_SEEDS, losses, strict=False)
    ]


@pytest.mark.parametrize(
    ("losses", "ms", "says"),
    [
        ((3.0, 3.1, 3.2), 90.0, "ships"),
        ((3.0, 3.1, 3.2), 101.0, "does not ship"),  # slower
        ((3.02, 3.12, 3.22), 90.0, "does not ship"),  # worse
        ((3.0, 3.1, 3.25), 90.0, "does not ship"),  # uncertain
        ((3.0, 3.1, None), 90.0, "does not ship"),  # diverged
        ((3.0, 3.1), 90.0, "wait for 3 seeds"),
    ],
)
def test_a_precision_ships_if_it_is_faster_and_surely_as_good(losses, ms, says):
    rows = runs("dopr-muon", (3.0, 3.1, 3.2), 100.0)
    rows += runs("dopr-muon, bf16 gradients", losses, ms)
    found = decisions(pretraining=rows)
    assert found["dopr-muon, bf16 gradients against dopr-muon"].follows == says
    assert found["dopr-muon against muon"].measured == "not measured"


def test_results_of_steps_and_of_stages_are_read_in_the_order_of_the_steps(tmp_path):
    for name in ("gpu_head", "loop", "correctness"):
        write_rows(tmp_path / f"{name}.json", {}, [{"name": name}])
    (tmp_path / "loop.log").write_text("not a result")
    results = read_results(tmp_path)
    assert list(results) == ["correctness", "loop", "head"]
    assert results["head"]["rows"] == [{"name": "gpu_head"}]
    assert json.loads((tmp_path / "loop.json").read_text()) == results["loop"]


@pytest.mark.parametrize("environment", [{"device": "x86_64"}, {"device": "GPU", "cuda": "13.0"}])
def test_results_without_a_gpu_are_marked(environment):
    text = report({"head": {"environment": environment, "rows": []}})
    assert text.startswith("Not all of these results") == ("cuda" not in environment)
    assert "head over whole tiles" in text
