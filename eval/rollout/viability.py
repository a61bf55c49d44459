"""Test whether a text can still become a valid Python file.

A text is viable if it has a continuation with which it parses. It is tested up to its last newline,
because an unfinished line can still change. The test uses the parser of the running interpreter,
which distinguishes wrong input from incomplete input for the interactive console (`codeop`). It
checks the grammar only: `return` outside a function parses.

    S(l) = share of texts whose first l tokens are viable
    h(l) = 1 - S(l) / S(l - 1), S(0) = 1     hazard: probability to fail at l after surviving l - 1

A text that is not viable has no viable continuation, so bisection finds the first failure. Before
Python 3.12 the parser checks the inside of an f-string only once it is closed.
"""

import ast
import codeop
import warnings
from bisect import bisect_left
from collections.abc import Sequence

import numpy as np

from data.tokenizer import Tokenizer

FLAGS = codeop.Compile().flags | ast.PyCF_ONLY_AST
# Python 3.12.0 and 3.12.1 report the second message (python/cpython#113703).
ENDS_TOO_EARLY = ("incomplete input", "unterminated triple-quoted f-string literal")


def is_viable(source: bytes) -> bool:
    """Return whether the complete lines of `source` can be the start of a Python file in UTF-8."""
    lines = source[: source.rfind(b"\n") + 1]
    try:
        text = lines.decode("utf-8-sig")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # "\d" and `1 is 1` parse, but with a warning
            compile(text, "<text>", "exec", FLAGS, dont_inherit=True)
    except SyntaxError as error:
        return str(error.msg).startswith(ENDS_TOO_EARLY)
    except (ValueError, RecursionError, MemoryError):  # not UTF-8, null bytes, nested too deep
        return False
    return True


def first_failure(source: bytes) -> int | None:
    """Return the number of bytes up to the end of the first line that makes `source` not viable.

    Return None if `source` is viable.
    """
    if is_viable(source):
        return None
    ends = [place + 1 for place, byte in enumerate(source) if byte == ord("\n")]
    line = bisect_left(ends, True, hi=len(ends) - 1, key=lambda end: not is_viable(source[:end]))
    return ends[line]


def survivors(
    tokenizer: Tokenizer, rows: Sequence[Sequence[int]], n_prompt: int, horizon: int
) -> np.ndarray:  # (n, H) bool
    """Return whether each text is viable after the first l = 1..H tokens of its continuation.

    Args:
        rows: ids of prompt and continuation, without end-of-text. A text that ends before H tokens
            keeps its last state. A text whose prompt is not viable is never alive.
    """
    sizes = tokenizer.token_bytes()
    alive = np.ones((len(rows), horizon), dtype=bool)
    for row, ids in zip(alive, rows, strict=True):
        failure = first_failure(tokenizer.decode_bytes(ids))
        if failure is not None:
            token = np.searchsorted(sizes[ids].cumsum(), failure)  # the token that ends the line
            row[max(token - n_prompt, 0) :] = False
    return alive


def hazard(survival: np.ndarray) -> np.ndarray:  # (..., H) -> (..., H)
    """Return the share of the texts alive before each step that fail at it; 0 if none are left."""
    before = np.concatenate([np.ones_like(survival[..., :1]), survival[..., :-1]], axis=-1)
    return 1 - np.divide(survival, before, out=np.ones_like(survival), where=before > 0)
