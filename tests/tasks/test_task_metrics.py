"""Scores against scikit-learn, scipy and definitions."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
import sklearn.metrics as sk
from scipy import stats

from paretune.tasks import metrics

_random = random.Random(0)
CLASSES = [[_random.randrange(4) for _ in range(50)] for _ in range(2)]
BINARY = [[_random.randrange(2) for _ in range(50)] for _ in range(2)]
NUMBERS = [[_random.gauss(0, 1) for _ in range(50)] for _ in range(2)]
SETS = [[[_random.randrange(2) for _ in range(3)] for _ in range(50)] for _ in range(2)]


@pytest.mark.parametrize(
    ("name", "data", "expected"),
    [
        ("accuracy", CLASSES, sk.accuracy_score(*CLASSES)),
        ("accuracy", SETS, sk.accuracy_score(*SETS)),
        ("f1", BINARY, sk.f1_score(*BINARY)),
        ("f1", CLASSES, sk.f1_score(*CLASSES, average="macro")),
        ("f1", SETS, sk.f1_score(*SETS, average="macro")),
        ("f1_macro", BINARY, sk.f1_score(*BINARY, average="macro")),
        ("f1_micro", SETS, sk.f1_score(*SETS, average="micro")),
        ("matthews", CLASSES, sk.matthews_corrcoef(*CLASSES)),
        ("pearson", NUMBERS, stats.pearsonr(*NUMBERS)[0]),
        ("spearman", NUMBERS, stats.spearmanr(*NUMBERS)[0]),
        ("r2", NUMBERS, sk.r2_score(*NUMBERS)),
        ("neg_mean_absolute_error", NUMBERS, -sk.mean_absolute_error(*NUMBERS)),
        ("balanced_accuracy", CLASSES, sk.balanced_accuracy_score(*CLASSES)),
    ],
)
def test_a_score(name: str, data: list[Any], expected: float) -> None:
    truth, predicted = data
    assert metrics.evaluate(name, truth, predicted=predicted) == pytest.approx(expected)


def test_perplexity_weighs_tokens_not_texts() -> None:
    assert metrics.evaluate("perplexity", [], predicted=[(2 * math.log(8), 2), (6 * math.log(2), 6)]) == pytest.approx(8 ** (2 / 8) * 2 ** (6 / 8))


def test_a_constant_prediction_correlates_with_nothing() -> None:
    assert metrics.evaluate("pearson", [1.0, 2.0, 3.0], predicted=[5.0, 5.0, 5.0]) == 0.0
    assert metrics.evaluate("spearman", [1.0, 2.0, 3.0], predicted=[5.0, 5.0, 5.0]) == 0.0


def test_exact_match_takes_any_reference_and_forgives_spaces() -> None:
    assert metrics.evaluate("exact_match", [["a b", "c"], ["d"], ["e"]], predicted=[" c ", "d d", "e"]) == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("truth", "predicted", "expected"),
    [
        ("B-P I-P O B-L", "B-P I-P O B-L", 1.0),
        ("B-P I-P O B-L", "B-P O O B-L", 0.5),  # one of two whole on either side
        ("B-P I-P O B-L", "B-P I-P O B-P", 0.5),
        ("B-P B-P", "B-P I-P", 0.0),
        ("O I-P I-P", "O B-P I-P", 1.0),
        ("O O", "O O", 1.0),
        ("O O", "B-P O", 0.0),
    ],
)
def test_spans_count_only_whole(truth: str, predicted: str, expected: float) -> None:
    assert metrics.evaluate("f1_spans", [truth.split()], predicted=[predicted.split()]) == expected


ONE = [["the cat sat on the mat today"], ["a dog ran home"]]


@pytest.mark.parametrize("name, best", [("bleu", 1.0), ("chrf", 1.0), ("rouge_l", 1.0), ("ter", 0.0)])
def test_a_text_that_equals_one_of_its_references_has_the_best_score(name: str, best: float) -> None:
    several = [["something else", *ONE[0]], ONE[1]]
    assert metrics.evaluate(name, several, predicted=[ONE[0][0], ONE[1][0]]) == pytest.approx(best)
    worse = metrics.evaluate(name, several, predicted=["mat cat", "ran a dog"])
    assert worse > best if metrics.better(name) == "lower" else worse < best


def test_bleu_is_its_formula() -> None:
    """Papineni et al. 2002: the geometric mean of the n-gram precisions times exp(1 - r/c); here 6/7, 5/6, 4/5 and 3/4, of equal length."""
    precisions = [6 / 7, 5 / 6, 4 / 5, 3 / 4]
    got = metrics.evaluate("bleu", ONE[:1], predicted=["the cat sat on the mat yesterday"])
    assert got == pytest.approx(math.exp(sum(map(math.log, precisions)) / 4))


def test_rouge_l_is_the_f1_of_the_longest_common_subsequence() -> None:
    assert metrics.evaluate("rouge_l", [["a b c d"]], predicted=["a c x"]) == pytest.approx(2 * (2 / 3) * (2 / 4) / (2 / 3 + 2 / 4))


def test_nist_is_the_information_of_the_right_words() -> None:
    """Doddington 2002: an n-gram's information is log2 of how often its first n - 1 words come per time it comes; four words, each once."""
    assert metrics.evaluate("nist", [["w x y z v"]], predicted=["w x y z v"]) == pytest.approx(math.log2(5))
    assert metrics.evaluate("nist", [["w x y z v"]], predicted=["u"]) == 0.0
