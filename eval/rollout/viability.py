"""Is a text still the beginning of some Python file?

A text is viable if a continuation exists with which it parses. It is judged up to its last newline,
because an unfinished line can become anything. The judge is the parser of the interpreter that
runs this, which tells input that is wrong from input that ends too early, as the interactive
console needs it (`codeop`). It knows the grammar only: `return` outside a function parses.

    S(l) = share of texts whose first l tokens are viable
    h(l) = 1 - S(l) / S(l - 1), S(0) = 1     the hazard: to fail at l, given survival before

What no continuation can save stays lost, so a first failure can be found by bisection.
Before Python 3.12 the parser looks into an f-string only once it is closed.
"""

import ast
import codeop
import warnings
from bisect import bisect_left
from collections.abc import Sequence

import numpy as np

from data.tokenizer import Tokenizer

FLAGS = codeop.Compile().flags | ast.PyCF_ONLY_AST
# The second is what Python 3.12.0 and 3.12.1 say (python/cpython#113703).
ENDS_TOO_EARLY = ("incomplete input", "unterminated triple-quoted f-string literal")


def is_viable(source: bytes) -> bool:
    """Whether the whole lines of `source` can begin a Python file in UTF-8."""
    lines = source[: source.rfind(b"\n") + 1]
    try:
        text = lines.decode("utf-8-sig")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # "\d" and `1 is 1` parse
            compile(text, "<text>", "exec", FLAGS, dont_inherit=True)
    except SyntaxError as error:
        return str(error.msg).startswith(ENDS_TOO_EARLY)
    except (ValueError, RecursionError, MemoryError):  # not UTF-8, null bytes, nested too deep
        return False
    return True


def first_failure(source: bytes) -> int | None:
    """Bytes up to the end of the first line with which `source` is not viable; None: it is."""
    if is_viable(source):
        return None
    ends = [place + 1 for place, byte in enumerate(source) if byte == ord("\n")]
    is_lost = bisect_left(ends, True, hi=len(ends) - 1, key=lambda end: not is_viable(source[:end]))
    return ends[is_lost]


def survivors(
    tokenizer: Tokenizer, rows: Sequence[Sequence[int]], n_prompt: int, horizon: int
) -> np.ndarray:  # (n, H) bool
    """Whether the first l = 1..H tokens behind the prompt leave each text viable.

    rows: ids of prompt and continuation, without end-of-text. A text that is shorter than H keeps
    its last state; one that fails within the prompt never lives.
    """
    sizes = tokenizer.token_bytes()
    alive = np.ones((len(rows), horizon), dtype=bool)
    for row, ids in zip(alive, rows, strict=True):
        lost = first_failure(tokenizer.decode_bytes(ids))
        if lost is not None:
            token = np.searchsorted(sizes[ids].cumsum(), lost)  # the one that completes the line
            row[max(token - n_prompt, 0) :] = False
    return alive


def hazard(survival: np.ndarray) -> np.ndarray:  # (..., H) -> (..., H)
    """Share of those alive before each step that fail at it; 0 where none is left."""
    before = np.concatenate([np.ones_like(survival[..., :1]), survival[..., :-1]], axis=-1)
    return 1 - np.divide(survival, before, out=np.ones_like(survival), where=before > 0)
