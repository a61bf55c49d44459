"""How repetitive token sequences are; to stand beside every likelihood, because loops please it.

`ids` are (N, T > 0) whole numbers, -1 behind the end of a shorter row (`padded`, from lists).
"""

from collections.abc import Sequence

import numpy as np


def padded(rows: Sequence[Sequence[int]]) -> np.ndarray:  # (N, T) int64
    """Rows of any lengths side by side, filled up with -1 on the right."""
    ids = np.full((len(rows), max(map(len, rows), default=0)), -1)
    for target, row in zip(ids, rows, strict=True):
        target[: len(row)] = row
    return ids


def distinct(ids: np.ndarray, n: int) -> np.ndarray:  # (N, T) -> (N,) float64
    """Distinct n-grams of each row over all its n-grams; NaN for a row of fewer than n tokens.

    distinct-n of Li et al. 2016, within a row: pooled over rows it depends on how many there are.
    """
    grams = np.sort(_ngrams(ids, n), axis=1)  # (N, T - n + 1), -1 where there is none
    is_new = np.diff(grams, axis=1, prepend=-1) > 0
    count = (grams >= 0).sum(1)
    return np.divide(is_new.sum(1), count, out=np.full(len(ids), np.nan), where=count > 0)


def seq_rep(ids: np.ndarray, n: int) -> np.ndarray:  # (N, T) -> (N,) float64
    """seq-rep-n = 1 - distinct n-grams / n-grams of each row (Welleck et al. 2020, section 6)."""
    return 1 - distinct(ids, n)


def ends_in_loop(ids: np.ndarray, max_period: int) -> np.ndarray:  # (N, T) -> (N,) bool
    """Rows whose last 2 k tokens, k = max_period, have a period of at most k.

    So a cycle was run through at least twice. A row of fewer than 2 k tokens is no loop.
    """
    lengths = (ids >= 0).sum(1)  # (N,)
    columns = lengths[:, None] + np.arange(-2 * max_period, 0)
    tails = np.take_along_axis(ids, np.maximum(columns, 0), axis=1)  # (N, 2k)
    periods = range(1, max_period + 1)
    repeats = [(tails[:, p:] == tails[:, :-p]).all(1) for p in periods]  # (N,) each
    return np.any(repeats, axis=0) & (lengths >= 2 * max_period)


def zipf(counts: np.ndarray) -> np.ndarray:  # (..., V) -> (...)
    """Zipf's coefficient s of frequency ~ rank^-s (about 1 for text, large for few tokens).

    Least squares of log count on log rank over all tokens that occur (Holtzman et al. 2020, 5.2,
    who stop at rank 5000). counts need not be whole. NaN if fewer than two tokens occur.
    """
    ranked = -np.sort(-counts, axis=-1)
    occurs = ranked > 0
    n = np.maximum(occurs.sum(-1, keepdims=True), 1)
    x = np.broadcast_to(np.log(np.arange(1, counts.shape[-1] + 1)), ranked.shape)
    y = np.log(ranked, where=occurs, out=np.zeros(ranked.shape))
    x = np.where(occurs, x - np.sum(x, -1, where=occurs, keepdims=True) / n, 0)
    spread = (x * x).sum(-1)
    return np.divide(-(x * y).sum(-1), spread, out=np.full(spread.shape, np.nan), where=spread > 0)


def _ngrams(ids: np.ndarray, n: int) -> np.ndarray:  # (N, T) -> (N, T - n + 1)
    """A number for every n-gram, equal for equal ones; -1 where it reaches beyond a row's end."""
    width = max(ids.shape[1] - n + 1, 0)
    codes = ids[:, :width]
    for offset in range(1, n):
        pairs = codes * (ids.max(initial=0) + 1) + ids[:, offset : offset + width]
        codes = np.unique(pairs, return_inverse=True)[1].reshape(pairs.shape)
    return np.where(ids[:, n - 1 : n - 1 + width] >= 0, codes, -1)
