"""Test which texts can begin a Python file, and where the others fail."""

import ast
import random
import sys
import sysconfig
from pathlib import Path

import numpy as np
import pytest

from data.pystdlib.prepare import stdlib_files
from data.tokenizer import Tokenizer, byte_tokenizer
from eval.rollout.viability import first_failure, hazard, is_viable, survivors

VIABLE = [
    "",
    "\n# a comment\n",
    "x = 1\n",
    "\ufeffx = 1\n",
    "\x0cx = 1\r\ny = 2\r\n",
    "def f():\n",
    "def f():\n# nothing yet\n",
    "class A:\n    '''doc\n",
    "if a:\n\tb\n",
    "if a:\n  if b:\n    c\n",
    "@decorator\n\n# still none\n",
    "try:\n    a\n",
    "try: a\n",
    "for a in b:\n  c\nelse:\n",
    "x = (1,\n",
    "x = [y for\n",
    "x = {'a':\n",
    "f(a=1, **\n",
    "def f(a, *, b=(\n",
    "from a import (b,\n",
    "with open(a) as b, \\\n",
    "x = 1 + \\\n",
    "x = '''one\ntwo\n",
    "f'''{a}\n",
    "rb'''a\n",
    "match x:\n  case 1:\n",
    "return 1\n",
    "'\\d'\n",
    "1 is 1\n",
]
LOST = [
    "x = = 1\n",
    "x = )\n",
    "(]\n",
    "x = 'abc\n",
    "a b\n",
    "print 'a'\n",
    "  x\n",
    "if a:\nb\n",
    "if a:\n    b\n  c\n",
    "if a:\n\tb\n        c\n",
    "else:\n",
    "try:\n  a\nb\n",
    "@decorator\nx = 1\n",
    "def f()\n",
    "def f(a=1, b):\n",
    "x = 1 +\n",
    "x = 1\\ \n",
    "x = [1 2\n",
    "x = {1: 2, 3\n}\n",
    "f(**a, *b\n",
    "for 1 in (\n",
    "(a, 1) = \\\n",
    "'''a\n'''b\n",
    "0777\n",
    "x = ?\n",
    "x\ufeff = 1\n",
    "x = '\0'\n",
    "(" * 300 + "\n",
]


@pytest.mark.parametrize("text", VIABLE)
def test_some_continuation_parses(text):
    assert is_viable(text.encode())


@pytest.mark.parametrize("text", LOST)
def test_no_continuation_parses(text):
    assert not is_viable(text.encode())


def test_an_unfinished_line_is_not_judged():
    assert is_viable(b"x = 1\ny = )")
    assert not is_viable(b"x = 1\ny = )\n")


def test_bytes_that_are_not_utf8_and_endless_nesting_are_lost():
    assert not is_viable(b"x = '\xff'\n")
    assert is_viable(b"x = '\xc3\xa9'\ny = '\xc3")
    assert not is_viable(b"-" * 100_000 + b"1\n")


@pytest.mark.skipif(sys.version_info < (3, 12), reason="f-strings are parsed when they are closed")
def test_an_f_string_is_read_before_it_is_closed():
    assert not is_viable(b"f'''{a b}\n")


# -- rates on real text


@pytest.fixture(scope="module")
def sources():
    """Read standard library files that parse in about a millisecond."""
    files = stdlib_files(Path(sysconfig.get_paths()["stdlib"]))
    return [path.read_bytes() for path in files if 1000 < path.stat().st_size < 10_000][:200]


def beginnings(sources, n, seed=0):
    draw = random.Random(seed)
    chosen = (draw.choice(sources) for _ in range(n))
    return [text[: draw.randrange(500, len(text))] for text in chosen]


def corrupted(text, seed):
    """Replace 48 characters in the first half of the text by random ones."""
    draw = random.Random(seed)
    place = draw.randrange(len(text) // 2)
    noise = bytes(draw.choices(range(32, 127), k=48))
    return text[:place] + noise + text[place + 48 :]


def test_the_beginnings_of_real_files_are_viable(sources):
    assert all(map(is_viable, beginnings(sources, 500)))


def test_most_corrupted_beginnings_are_lost(sources):
    texts = [corrupted(text, seed) for seed, text in enumerate(beginnings(sources, 300, seed=1))]
    caught = sum(not is_viable(text) for text in texts)
    assert caught > 150  # 177 on Python 3.11; the others are mostly in comments and docstrings


def test_a_bracket_too_many_between_two_statements_is_always_found(sources):
    for text in sources[:50]:
        lines = text.decode("utf-8-sig").splitlines(keepends=True)
        for statement in ast.parse("".join(lines)).body:
            head = "".join(lines[: statement.end_lineno])
            assert is_viable(head.encode())
            assert not is_viable(f"{head})\n".encode())


def test_bisection_finds_the_first_line_that_a_scan_of_all_lines_finds(sources):
    for seed, text in enumerate(beginnings(sources, 60, seed=2)):
        broken = corrupted(text, seed)
        ends = [place + 1 for place, byte in enumerate(broken) if byte == ord("\n")]
        lost = (end for end in ends if not is_viable(broken[:end]))
        assert first_failure(broken) == next(lost, None)


# -- survival


def test_the_first_failure_is_the_end_of_the_line_that_no_later_one_saves():
    assert first_failure(b"x = (\n1 2\n)\ny = 1\n") == len(b"x = (\n1 2\n")
    assert first_failure(b"x = (\n1, 2\n)\n") is None


def test_a_text_lives_until_the_token_that_completes_its_first_lost_line():
    ids = list(b"x = 1\ny )\nz\n")
    alive = survivors(byte_tokenizer(), [ids], n_prompt=6, horizon=6)
    assert alive.tolist() == [[True, True, True, False, False, False]]


def test_a_token_may_hold_the_end_of_a_line_and_more():
    tokenizer = Tokenizer("pieces", r"(?s).+", {b"x": 0, b" )": 1, b"\nx = 1\n": 2, b"\n": 3})
    alive = survivors(tokenizer, [[0, 3, 0, 1, 2, 0], [0, 3, 0, 2, 0, 1]], n_prompt=2, horizon=4)
    assert alive.tolist() == [[True, True, False, False], [True] * 4]


def test_a_short_text_keeps_its_last_state():
    rows = [list(b"a\nb"), list(b"a\n)\n"), list(b")\nb")]
    alive = survivors(byte_tokenizer(), rows, n_prompt=2, horizon=4)
    assert alive.tolist() == [[True] * 4, [True, False, False, False], [False] * 4]


def test_the_hazard_is_the_share_of_the_living_that_fail():
    survival = np.array([0.8, 0.8, 0.2, 0.0, 0.0])
    expected = [0.2, 0.0, 0.75, 1.0, 0.0]
    np.testing.assert_allclose(hazard(survival), expected, atol=1e-15)  # one rounding
    np.testing.assert_allclose(np.cumprod(1 - hazard(survival)), survival, atol=1e-15)
