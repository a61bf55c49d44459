"""Test reference policies whose grades are known."""

import math

import pytest

from eval.rollout.tasks import parse_task
from eval.rollout.tasks.lds import Lds
from studies.sweep.reference import command_of, main

SMALL = "pdfa,states=4,alphabet=4,horizon=8,n_documents=64"


def test_the_oracle_has_no_error_and_the_uniform_policy_the_largest_entropy():
    task = parse_task(SMALL)
    oracle = task.grade_reference("oracle", n=64, seed=0).means()
    assert oracle["sequence_kl"] == oracle["accumulated_kl"] == oracle["gap"] == 0
    uniform = task.grade_reference("uniform", n=64, seed=0).means()
    assert uniform["val_ce"] == pytest.approx(math.log(5))  # four symbols and the end of text
    assert uniform["sequence_kl"] > 1


def test_a_policy_that_never_acts_leaves_the_expert_in_an_unstable_system():
    lds = Lds(instance=3)
    means = lds.grade_reference("zero", n=1, seed=0).means()
    assert means["log10_deviation"] > 2  # two modes grow by 1.1 a step, for a hundred steps


def test_the_command_of_a_record_prints_a_line_for_each_reference(capsys):
    words = command_of(f"task:{SMALL}", n=16, seed=1).split()
    main(words[3:])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["oracle", "greedy", "uniform"]
    assert "sequence_kl 0 " in lines[0]


@pytest.mark.parametrize(
    ("words", "problem"),
    [(["pystdlib"], "has no oracle"), ([SMALL, "--episodes", "0"], "at least 1"), (["x"], "x")],
)
def test_a_task_without_references_and_wrong_arguments_are_refused(words, problem, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(words)
    assert problem in capsys.readouterr().err
