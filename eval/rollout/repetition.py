"""Measure how repetitive token sequences are.

Report these numbers beside every likelihood, because repetitive text is likely text. In all
functions `ids` is an (N, T > 0) integer array; shorter rows are padded with -1.
"""

import numpy as np


def distinct(ids: np.ndarray, n: int) -> np.ndarray:  # (N, T) -> (N,) float64
    """Compute distinct-n (Li et al. 2016): the distinct n-grams of a row over all its n-grams.

    It is computed within each row, because a value pooled over rows would depend on their number.
    A row with fewer than n tokens gets NaN.
    """
    grams = np.sort(_ngrams(ids, n), axis=1)  # (N, T - n + 1), -1 in the padding
    is_new = np.diff(grams, axis=1, prepend=-1) > 0
    count = (grams >= 0).sum(1)
    return np.divide(is_new.sum(1), count, out=np.full(len(ids), np.nan), where=count > 0)


def seq_rep(ids: np.ndarray, n: int) -> np.ndarray:  # (N, T) -> (N,) float64
    """Compute seq-rep-n = 1 - distinct-n of each row (Welleck et al. 2020, section 6)."""
    return 1 - distinct(ids, n)


def ends_in_loop(ids: np.ndarray, max_period: int) -> np.ndarray:  # (N, T) -> (N,) bool
    """Test whether the last 2 k tokens of each row have a period of at most k = max_period.

    If they do, the row ends with at least two passes through a cycle. A row with fewer than 2 k
    tokens does not count as a loop.
    """
    lengths = (ids >= 0).sum(1)  # (N,)
    columns = lengths[:, None] + np.arange(-2 * max_period, 0)
    tails = np.take_along_axis(ids, np.maximum(columns, 0), axis=1)  # (N, 2k)
    periods = range(1, max_period + 1)
    repeats = [(tails[:, p:] == tails[:, :-p]).all(1) for p in periods]  # (N,) each
    return np.any(repeats, axis=0) & (lengths >= 2 * max_period)


def zipf(counts: np.ndarray) -> np.ndarray:  # (..., V) -> (...)
    """Fit Zipf's coefficient s in frequency ~ rank^-s, about 1 for text and larger for few tokens.

    The fit is a least-squares regression of log count on log rank over all tokens that occur
    (Holtzman et al. 2020, section 5.2, who stop at rank 5000). The counts may be fractional. The
    result is NaN if fewer than two tokens occur.
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
    """Number the n-grams so that equal ones get equal numbers; those with padding get -1."""
    width = max(ids.shape[1] - n + 1, 0)
    codes = ids[:, :width]
    for offset in range(1, n):
        pairs = codes * (ids.max(initial=0) + 1) + ids[:, offset : offset + width]
        codes = np.unique(pairs, return_inverse=True)[1].reshape(pairs.shape)
    return np.where(ids[:, n - 1 : n - 1 + width] >= 0, codes, -1)
