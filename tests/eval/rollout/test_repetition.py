"""Compare the repetition metrics with counts by hand, nltk's n-grams and scipy's regression."""

import numpy as np
import pytest
from scipy.stats import linregress

from eval.rollout.repetition import distinct, ends_in_loop, seq_rep, zipf

PI = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9, 3]
FIBONACCI = [0, 1, 0, 1, 2, 0, 1, 0, 1, 2, 0]
# (types, tokens) for n = 1 to 4 as counted by nltk 3.10.4: B() and N() of FreqDist(ngrams(row, n)).
NLTK = [
    (PI, [(9, 16), (15, 15), (14, 14), (13, 13)]),
    ([1, 2, 3] * 5, [(3, 15), (3, 14), (3, 13), (3, 12)]),
    ([7] * 9, [(1, 9), (1, 8), (1, 7), (1, 6)]),
    (FIBONACCI, [(3, 11), (4, 10), (5, 9), (5, 8)]),
]


def padded(rows):
    """Stack rows of different lengths and pad them with -1 on the right."""
    ids = np.full((len(rows), max(map(len, rows), default=0)), -1)
    for target, row in zip(ids, rows, strict=True):
        target[: len(row)] = row
    return ids


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_distinct_and_seq_rep_are_what_nltk_counts(n):
    ids = padded([row for row, _ in NLTK])
    expected = np.array([types / tokens for _, counts in NLTK for types, tokens in [counts[n - 1]]])
    np.testing.assert_array_equal(distinct(ids, n), expected)
    np.testing.assert_array_equal(seq_rep(ids, n), 1 - expected)


def test_a_row_by_hand():
    # three of the four bigrams ab ba ab bc are distinct
    assert distinct(np.array([[0, 1, 0, 1, 2]]), 2).tolist() == [3 / 4]
    assert seq_rep(np.array([[0, 1, 0, 1, 2]]), 2).tolist() == [1 / 4]


def test_random_rows_of_large_ids_equal_a_set_of_tuples():
    ids = np.random.default_rng(0).choice([0, 1, 65_000, 65_535], size=(50, 40))
    for n in (2, 3, 4, 6):
        grams = [{tuple(row[i : i + n]) for i in range(41 - n)} for row in ids]
        expected = [len(each) / (41 - n) for each in grams]
        np.testing.assert_array_equal(distinct(ids, n), expected)


def test_padding_changes_nothing_and_too_short_a_row_has_no_value():
    both = distinct(padded([[1, 2, 1, 2], [5, 5, 5, 5, 5, 5], [1]]), 2)
    np.testing.assert_array_equal(both, [2 / 3, 1 / 5, np.nan])
    assert np.isnan(seq_rep(np.array([[1, 2]]), 4)).all()


@pytest.mark.parametrize(
    ("row", "is_loop"),
    [
        ([9, 9, 9, 1, 2, 3, 1, 2, 3], True),  # period 3, twice
        ([9, 9, 9, 2, 1, 2, 1, 2, 1], True),  # period 2, three times
        ([7] * 6, True),
        ([2, 3, 1, 2, 3, 1], True),  # in the middle of the cycle
        ([1, 2, 3, 1, 2, 3, 9], False),  # the loop was left
        ([1, 2, 3, 4, 1, 2, 3, 4], False),  # period 4 > 3
        ([7] * 5, False),  # shorter than two periods
        ([1, 2, 3, 1, 2, 4], False),
    ],
)
def test_a_loop_is_a_short_period_at_the_end(row, is_loop):
    assert ends_in_loop(padded([row]), 3).tolist() == [is_loop]
    assert ends_in_loop(padded([row, [0] * 20]), 3).tolist() == [is_loop, True]


def test_exact_power_laws_give_their_exponents():
    rank = np.arange(1, 101)
    counts = np.random.default_rng(0).permuted(np.stack([1e6 / rank**0.9, 1e6 / rank**1.3]), axis=1)
    np.testing.assert_allclose(zipf(counts), [0.9, 1.3], rtol=1e-12)  # float64


def test_zipf_is_the_slope_of_scipys_regression_over_the_tokens_that_occur():
    counts = np.random.default_rng(0).poisson(2.0, size=(3, 40))
    for row, slope in zip(counts, zipf(counts), strict=True):
        ranked = np.sort(row[row > 0])[::-1]
        line = linregress(np.log(np.arange(1, len(ranked) + 1)), np.log(ranked))
        assert slope == pytest.approx(-line.slope, rel=1e-12)  # float64


def test_a_single_token_has_no_zipf_coefficient_and_equal_counts_have_zero():
    assert np.isnan(zipf(np.array([[0, 5, 0], [0, 0, 0]]))).all()
    assert zipf(np.array([4, 4, 4])) == pytest.approx(0, abs=1e-12)
