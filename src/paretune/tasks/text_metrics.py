"""Scores of generated texts against one or several references each; the formulas are sacrebleu's, rouge-score's and NLTK's.

Every score lies between 0 and 1 except NIST (information, in bits) and TER (edits per reference word, lower is better).
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from types import ModuleType

from paretune.errors import DataError

References = Sequence[Sequence[str]]


def _sacrebleu(name: str) -> Callable[[References, Sequence[str]], float]:
    def score(truth: References, predicted: Sequence[str]) -> float:
        return getattr(_library("sacrebleu"), f"corpus_{name}")(list(predicted), _streams(truth)).score / 100

    return score


def _streams(truth: References) -> list[list[str | None]]:
    """One stream per reference, as sacrebleu takes them."""
    return [[texts[i] if i < len(texts) else None for texts in truth] for i in range(max(map(len, truth)))]


def sacrebleu_redrawn(name: str, truth: References, *, predicted: Sequence[str]) -> Callable[[Sequence[int]], float]:
    """"bleu", "chrf" or "ter" as a function of row numbers: each text's counts are made once and summed anew, as sacrebleu's own bootstrap does."""
    metric = getattr(_library("sacrebleu.metrics"), name.upper())()
    counts = metric._extract_corpus_statistics(list(predicted), _streams(truth))
    return lambda drawn: float(metric._aggregate_and_compute([counts[i] for i in drawn]).score / 100)


def _rouge_l(truth: References, predicted: Sequence[str]) -> float:
    """The mean over texts of the best F1 of the longest common subsequence."""
    scorer = _library("rouge_score.rouge_scorer").RougeScorer(["rougeL"])
    return sum(scorer.score_multi(texts, p)["rougeL"].fmeasure for texts, p in zip(truth, predicted, strict=True)) / len(predicted)


def _nist(truth: References, predicted: Sequence[str]) -> float:
    """NIST-5 on texts parted at spaces; 0 where no word of any text is right."""
    nist = _library("nltk.translate.nist_score")
    try:
        return float(nist.corpus_nist([[t.split() for t in texts] for texts in truth], [p.split() for p in predicted], n=5))
    except ZeroDivisionError:  # NLTK divides by the number of n-grams, which very short texts have none of
        return 0.0


def _library(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError:
        raise DataError(f"scores of generated texts need {name.partition('.')[0]}: pip install 'paretune[text]'") from None


TEXT: dict[str, Callable[[References, Sequence[str]], float]] = {
    "bleu": _sacrebleu("bleu"),
    "chrf": _sacrebleu("chrf"),
    "ter": _sacrebleu("ter"),
    "rouge_l": _rouge_l,
    "nist": _nist,
}
