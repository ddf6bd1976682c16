"""Multinomial logistic regression with an L2 penalty, for a grid of penalties at once.

The problem is that of scikit-learn's LogisticRegression: minimise C * (sum of cross-entropies) + ||W||^2 / 2 over the
weights W [D, K] and an unpenalised bias [K]. The features are first rotated to their principal axes, of which there are
at most min(N, D). A rotation does not change the penalty, so the solution is the same. L-BFGS then starts from the
solution of the next smaller C.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Classes = NDArray[np.int64]


def fit_predict(
    train: Array, labels: Classes, test: Array, grid: Sequence[float], *, tolerance: float = 1e-5
) -> Classes:
    """Predicted classes [len(grid), M] of test features [M, D], from models of the train features [N, D].

    Both are standardised with the mean and deviation of `train`. labels: [N], 0 to K - 1. grid: values of C.
    tolerance: bound on the largest entry of the gradient of the mean loss (scikit-learn's `tol`). For two classes,
    scikit-learn has one weight vector w with the penalty ||w||^2 / 2. Two vectors w / 2 and -w / 2 have half that
    penalty, so C is halved.
    """
    x, y = standardise(train, test)
    axes = _principal_axes(x)
    x, y = x @ axes, y @ axes
    target = np.eye(int(labels.max()) + 1)[labels]
    solution = np.zeros((x.shape[1] + 1, target.shape[1]))
    found = np.empty((len(grid), len(y)), dtype=np.int64)
    for place in np.argsort(grid):
        C = float(grid[place]) / (2 if target.shape[1] == 2 else 1)
        solution = _solve(x, target, C, solution, tolerance)
        found[place] = np.argmax(y @ solution[:-1] + solution[-1], axis=1)
    return found


def standardise(train: Array, test: Array) -> tuple[Array, Array]:
    """Standardise both arrays with the mean and deviation of `train`. Columns constant in `train` become 0 in it."""
    mean, deviation = train.mean(axis=0), train.std(axis=0)
    constant = deviation <= 10 * np.finfo(np.float64).eps * np.abs(mean)
    deviation = np.where(constant, 1.0, deviation)
    return (train - mean) / deviation, (test - mean) / deviation


def _principal_axes(x: Array) -> Array:
    """Orthonormal axes [D, R] that span the rows of x [N, D]; axes that are rounding errors are omitted."""
    wide = x.shape[1] > x.shape[0]
    values, vectors = np.linalg.eigh(x @ x.T if wide else x.T @ x)
    kept = values > max(values[-1], 1e-300) * 1e-12
    vectors = vectors[:, kept]
    return x.T @ (vectors / np.sqrt(values[kept])) if wide else vectors


def _solve(x: Array, target: Array, C: float, start: Array, tolerance: float) -> Array:
    """Weights and, as the last row, the bias [R + 1, K] for one C."""
    from scipy.optimize import minimize

    total = C * len(x)

    def loss(flat: Array) -> tuple[float, Array]:
        z = flat.reshape(start.shape)
        logits = x @ z[:-1] + z[-1]
        logits -= logits.max(axis=1, keepdims=True)
        likelihood = (logits * target).sum()
        np.exp(logits, out=logits)
        sums = logits.sum(axis=1, keepdims=True)
        value = C * (np.log(sums).sum() - likelihood) + 0.5 * (z[:-1] ** 2).sum()
        error = C * (logits / sums - target)
        gradient = np.vstack([x.T @ error + z[:-1], error.sum(axis=0)])
        return value / total, gradient.ravel() / total

    options = {"maxiter": 2000, "maxfun": 4000, "ftol": 1e-12, "gtol": tolerance, "maxcor": 20}
    found: Array = minimize(loss, start.ravel(), jac=True, method="L-BFGS-B", options=options).x
    return found.reshape(start.shape)
