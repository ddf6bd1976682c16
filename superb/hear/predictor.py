"""HEAR's predictor: a perceptron on frozen embeddings, chosen by its score on validation data.

After heareval 2021.1 (Turian et al. 2022, arXiv 2203.03022, section 4.3): one or two hidden layers of 1,024 with batch
norm, dropout 0.1 and ReLU; Adam with a learning rate of 3.2e-3, 1e-3, 3.2e-4 or 1e-4; Xavier uniform or normal weights;
batches of 1,024; up to 500 epochs. Every third epoch is validated; 20 validations without a better score end a
training, and the best epoch is kept. Of the 16 points of this grid, `points` are drawn; the first fold chooses one of
them for all folds.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from codecssl.superb.hear.metrics import Event
from codecssl.tokenize.common.errors import UserError

LEARNING_RATES = (3.2e-3, 1e-3, 3.2e-4, 1e-4)
HIDDEN_LAYERS = (1, 2)
MEDIAN_MS, SHORTEST_MS = (250.0,), (125.0, 250.0)
"""Smoothing of event predictions: widths of the median filter, and lengths below which events are dropped."""


@dataclass(frozen=True, kw_only=True)
class Point:
    """A point of the grid."""

    hidden_layers: int
    lr: float
    initialization: str


GRID = tuple(
    Point(hidden_layers=layers, lr=lr, initialization=kind)
    for layers, lr, kind in product(HIDDEN_LAYERS, LEARNING_RATES, ("uniform", "normal"))
)


@dataclass(frozen=True, kw_only=True)
class PredictorSettings:
    """Settings of the predictor; the defaults are HEAR's.

    points: points of the grid that are tried, 1 to 16. seed: seed of their choice, the weights and the batches.
    """

    points: int = 8
    seed: int = 0
    hidden_dim: int = 1024
    dropout: float = 0.1
    batch_size: int = 1024
    max_epochs: int = 500
    validate_every: int = 3
    patience: int = 20

    def __post_init__(self) -> None:
        if not 1 <= self.points <= len(GRID):
            raise UserError(f"--grid-points {self.points}: from 1 to {len(GRID)}")

    def drawn(self) -> list[Point]:
        """Return the points to try, in random order."""
        order = np.random.default_rng(self.seed).permutation(len(GRID))
        return [GRID[index] for index in order[: self.points]]


class Perceptron(nn.Module):
    """Embeddings [N, D] to logits [N, C]."""

    def __init__(self, dim: int, classes: int, point: Point, settings: PredictorSettings) -> None:
        super().__init__()
        initialize = getattr(nn.init, f"xavier_{point.initialization}_")
        layers: list[nn.Module] = []
        gain = 1.0
        for _ in range(point.hidden_layers):
            linear = nn.Linear(dim, settings.hidden_dim)
            initialize(linear.weight, gain=gain)
            layers += [linear, nn.BatchNorm1d(settings.hidden_dim), nn.Dropout(settings.dropout), nn.ReLU()]
            dim, gain = settings.hidden_dim, nn.init.calculate_gain("relu")
        last = nn.Linear(dim, classes)
        initialize(last.weight, gain=gain)
        self.layers = nn.Sequential(*layers, last)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.layers(x)
        return logits


@dataclass(frozen=True, kw_only=True)
class TrainedPredictor:
    """A trained predictor at its best epoch."""

    model: Perceptron
    point: Point
    epoch: int
    score: float
    """Validation score; higher is better."""


def train(
    embeddings: Tensor,
    targets: Tensor,
    validate: Callable[[Perceptron], float],
    point: Point,
    settings: PredictorSettings,
    *,
    multilabel: bool,
) -> TrainedPredictor:
    """Train a predictor on embeddings [N, D] and targets [N, C], one-hot or multi-hot.

    validate: score of a predictor, higher is better; NaN counts as lowest.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        model = Perceptron(embeddings.shape[1], targets.shape[1], point, settings).to(embeddings.device)
        optimizer = torch.optim.Adam(model.parameters(), lr=point.lr)
        best, best_epoch, state, misses = -float("inf"), 0, copy.deepcopy(model.state_dict()), 0
        for epoch in range(1, settings.max_epochs + 1):
            model.train()
            for rows in torch.randperm(len(embeddings)).split(settings.batch_size):
                if len(rows) < 2:  # batch norm needs two
                    continue
                optimizer.zero_grad()
                logits = model(embeddings[rows])
                if multilabel:
                    loss = F.binary_cross_entropy_with_logits(logits, targets[rows])
                else:
                    loss = F.cross_entropy(logits, targets[rows].argmax(1))
                loss.backward()
                optimizer.step()
            if epoch % settings.validate_every:
                continue
            score = validate(model.eval())
            if score > best:
                best, best_epoch, state, misses = score, epoch, copy.deepcopy(model.state_dict()), 0
            else:
                misses += 1
            if misses >= settings.patience:
                break
        model.load_state_dict(state)
    return TrainedPredictor(model=model.eval(), point=point, epoch=best_epoch, score=best)


@torch.no_grad()
def predict(model: Perceptron, embeddings: Tensor, *, multilabel: bool) -> NDArray[np.float64]:
    """Probabilities [N, C]."""
    logits = torch.cat([model(part) for part in embeddings.split(1 << 14)])
    found = logits.sigmoid() if multilabel else logits.softmax(1)
    return found.double().cpu().numpy()  # type: ignore[no-any-return]


def events_of(
    probabilities: NDArray[np.float64],
    times: NDArray[np.float64],
    vocabulary: Sequence[str],
    *,
    median_ms: float,
    shortest_ms: float,
    threshold: float = 0.5,
) -> list[Event]:
    """Events of one clip from probabilities [T, C] at times [T] in milliseconds.

    The probabilities are smoothed by a median filter over time. Neighbouring frames above the threshold are one event,
    from the time of its first to that of its last frame. Events shorter than `shortest_ms` are dropped.
    """
    from scipy.ndimage import median_filter

    width = round(median_ms / float(np.mean(np.diff(times)))) if len(times) > 1 else 0
    if width:
        probabilities = median_filter(probabilities, size=(width, 1))
    active = np.pad(probabilities > threshold, ((1, 1), (0, 0)))
    found = []
    for index, label in enumerate(vocabulary):
        edges = np.flatnonzero(np.diff(active[:, index].astype(np.int8)))
        for first, end in zip(edges[0::2], edges[1::2], strict=True):
            if times[end - 1] - times[first] >= shortest_ms:
                found.append(Event(label, float(times[first]), float(times[end - 1])))
    return sorted(found, key=lambda event: event.start)
