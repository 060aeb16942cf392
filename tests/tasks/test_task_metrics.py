"""Scores against scikit-learn, scipy and definitions."""

from __future__ import annotations

import math
import random
from typing import Any

import numpy as np
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


def rows(values: list[Any]) -> list[list[Any]]:
    return [[value] for value in values]


MORE = [[f"{' '.join(random.Random(i).choices('abcdefgh', k=9))} {end}" for i in range(30)] for end in ("x", "a b")]
TAGS = [[random.Random(seed + i).choices(["O", "B-P", "I-P"], k=4 + i % 3) for i in range(30)] for seed in (0, 7)]
WORDS = [[[ord(tag[0]) for tag in text] for text in side] for side in TAGS]  # tags as numbers, one list for each text
PROBABILITIES = np.array([[1 - p, p] for p in (_random.random() for _ in range(50))])


@pytest.mark.parametrize(
    ("name", "data"),
    [
        *((name, CLASSES) for name in ("accuracy", "f1", "f1_macro", "f1_micro", "matthews", "balanced_accuracy")),
        *((name, BINARY) for name in ("f1", "matthews", "roc_auc")),
        *((name, SETS) for name in ("accuracy", "f1", "f1_micro")),
        *((name, NUMBERS) for name in ("pearson", "spearman", "r2")),
        *((name, [rows(MORE[0]), MORE[1]]) for name in ("bleu", "chrf", "ter", "rouge_l", "exact_match")),
        ("f1_spans", TAGS),
        ("perplexity", [[], [(random.Random(i).random() * 9, 3 + i % 5) for i in range(30)]]),
        ("perplexity", [[["a reference"] * (1 + i % 3) for i in range(30)], [(float(i % 7), 3 + i % 5) for i in range(30)]]),
    ],
)
def test_the_score_of_drawn_rows_is_that_of_a_task_of_these_rows(name: str, data: list[Any]) -> None:
    truth, predicted = data
    scores = PROBABILITIES if name == "roc_auc" else None
    score = metrics.redrawn(name, rows(truth) or [[]] * len(predicted), predicted=rows(predicted), scores=scores)
    for seed in range(3):
        drawn = np.random.default_rng(seed).integers(len(predicted), size=len(predicted))
        own = {"predicted": [predicted[i] for i in drawn], "scores": None if scores is None else scores[drawn]}
        assert score(drawn) == pytest.approx(metrics.evaluate(name, [truth[i] for i in drawn] if truth else [], **own))


@pytest.mark.parametrize("name", ["accuracy", "f1", "f1_micro", "matthews"])
def test_words_are_drawn_text_by_text(name: str) -> None:
    truth, predicted = WORDS
    drawn = np.random.default_rng(0).integers(30, size=30)
    flat = [[word for i in drawn for word in side[i]] for side in WORDS]
    assert metrics.redrawn(name, truth, predicted=predicted)(drawn) == pytest.approx(metrics.evaluate(name, flat[0], predicted=flat[1]))


def test_a_draw_without_a_score_is_nan_and_says_nothing() -> None:
    for name, data in (("matthews", BINARY), ("pearson", NUMBERS), ("spearman", NUMBERS), ("roc_auc", BINARY)):
        score = metrics.redrawn(name, rows(data[0]), predicted=rows(data[1]), scores=PROBABILITIES)
        assert math.isnan(score(np.zeros(50, dtype=int)))
    assert metrics.redrawn("nist", rows(rows(MORE[0])), predicted=rows(MORE[1])) is None
