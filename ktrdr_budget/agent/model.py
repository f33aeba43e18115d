"""A small logistic regression: the probability that the price rises on the next day."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from operator import mul
from statistics import fmean

__all__ = ["Model", "accuracy", "fit", "log_loss"]

Rows = Sequence[Sequence[float]]
Labels = Sequence[int]

_FEATURE_MAX = 5.0
"""Bound on scaled features, so that an outlier cannot dominate a weight."""
_CHANCE_MIN = 1e-12


@dataclass(frozen=True)
class Model:
    """The fitted weights, and the means and deviations that scale each row of features."""

    means: tuple[float, ...]
    deviations: tuple[float, ...]
    weights: tuple[float, ...]
    bias: float

    def chances(self, rows: Rows) -> list[float]:
        """Return the probability of a rise for each row, between 0 and 1."""
        return [_sigmoid(self.bias + _dot(self.weights, self.scaled(row))) for row in rows]

    def scaled(self, row: Sequence[float]) -> tuple[float, ...]:
        """Scale a row by the means and deviations of the training data."""
        parts = zip(row, self.means, self.deviations, strict=True)
        return tuple(max(-_FEATURE_MAX, min(_FEATURE_MAX, (value - mean) / scale)) for value, mean, scale in parts)


def fit(rows: Rows, labels: Labels, *, learning_rate: float, epochs: int, pause: Callable[[], None]) -> Model:
    """Fit a model by gradient descent on the log loss, starting from zero weights.

    Args:
        rows: features of each day.
        labels: 1 if the price rose on the day after, else 0.
        epochs: the number of passes over the data. With 0, the model is untrained.
        pause: a function that is called before each pass. To stop the fit, the function raises.
    """
    means = tuple(fmean(column) for column in zip(*rows, strict=True))
    deviations = tuple(_deviation(column, mean) for column, mean in zip(zip(*rows, strict=True), means, strict=True))
    model = Model(means, deviations, (0.0,) * len(means), 0.0)
    columns = list(zip(*map(model.scaled, rows), strict=True))
    for _ in range(epochs):
        pause()
        scores = [model.bias] * len(labels)
        for weight, column in zip(model.weights, columns, strict=True):
            scores = [score + weight * value for score, value in zip(scores, column, strict=True)]
        errors = [_sigmoid(score) - label for score, label in zip(scores, labels, strict=True)]
        gradient = (fmean(map(mul, errors, column)) for column in columns)
        weights = (weight - learning_rate * slope for weight, slope in zip(model.weights, gradient, strict=True))
        model = replace(model, weights=tuple(weights), bias=model.bias - learning_rate * fmean(errors))
    return model


def accuracy(chances: Sequence[float], labels: Labels) -> float:
    """Return the fraction of correct predictions. A probability above 0.5 predicts a rise."""
    return fmean((chance > 0.5) == (label == 1) for chance, label in zip(chances, labels, strict=True))


def log_loss(chances: Sequence[float], labels: Labels) -> float:
    """Return the mean log loss. If every chance is 0.5, the loss is ln 2 (0.693)."""
    likelihoods = (chance if label else 1 - chance for chance, label in zip(chances, labels, strict=True))
    return -fmean(math.log(max(_CHANCE_MIN, likelihood)) for likelihood in likelihoods)


def _deviation(column: Sequence[float], mean: float) -> float:
    return math.sqrt(fmean((value - mean) ** 2 for value in column)) or 1.0


def _dot(weights: Sequence[float], row: Sequence[float]) -> float:
    total: float = sum(map(mul, weights, row))
    return total


def _sigmoid(score: float) -> float:
    if score >= 0:
        return 1 / (1 + math.exp(-score))
    grown = math.exp(score)
    return grown / (1 + grown)
