"""A clustering of frames of features, and quality measures of its clusters.

One clustering labels both training and validation data. With two different ones the validation loss would rise.
"""

import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from codecssl.tokenize.common.errors import UserError
from codecssl.tokenize.common.files import write_atomic
from codecssl.tokenize.common.kmeans import fit_centroids

Features = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Clustering:
    """Centroids of one feature space."""

    centroids: Features
    """[C, D]"""
    made_of: dict[str, str]
    """Origin of the features: source, layer, sha256 of its weights."""

    def assign(self, features: Features) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
        """Return the nearest centroid [N] of features [N, D], and the squared distance to it [N], in float32."""
        products = features @ self.centroids.T
        partial = (self.centroids**2).sum(1)[None, :] - 2.0 * products
        nearest = partial.argmin(1)
        distance = np.take_along_axis(partial, nearest[:, None], 1)[:, 0] + (features**2).sum(1)
        return nearest, np.maximum(distance, 0.0)

    def save(self, path: Path) -> None:
        from safetensors.numpy import save

        write_atomic(path, save({"centroids": np.ascontiguousarray(self.centroids)}, metadata=self.made_of))

    @classmethod
    def load(cls, path: Path) -> "Clustering":
        """Load a clustering. Raises UserError if `path` is not a clustering."""
        from safetensors import safe_open

        try:
            with safe_open(path, "np") as file:
                return cls(file.get_tensor("centroids"), dict(file.metadata() or {}))
        except Exception as error:  # safetensors raises different exceptions for each kind of damage
            raise UserError(f"{path}: no clustering of codecssl-pretrain label ({error})") from error


def fit(batches: Iterable[Features], clusters: int, *, frames: int, seed: int) -> Features:
    """Fit centroids [clusters, D] to at most `frames` frames of `batches`. Raises UserError for too few frames."""
    taken, count = np.zeros((0, 0), dtype=np.float32), 0
    for batch in batches:
        if not count:
            taken = np.empty((frames, batch.shape[1]), dtype=np.float32)  # pages that are not filled cost no memory
        part = batch[: frames - count]
        taken[count : count + len(part)] = part
        count += len(part)
        if count == frames:
            break
    if count < clusters:
        raise UserError(f"--clusters {clusters}: only {count} frames to cluster; ask for fewer, or give more data")
    return fit_centroids(taken[:count], clusters, seed=seed, minibatches=True)


class Quality:
    """Quality measures of labels, accumulated over frames: inertia, cluster usage, and agreement with phones."""

    def __init__(self, clusters: int) -> None:
        self.counts = np.zeros(clusters, dtype=np.int64)
        self.inertia = 0.0
        self.joint: dict[str, npt.NDArray[np.int64]] = {}
        """For each phone, the number of frames in each cluster."""

    def add(self, labels: npt.NDArray[np.int64], distance: npt.NDArray[np.float32]) -> None:
        self.counts += np.bincount(labels, minlength=len(self.counts))
        self.inertia += float(distance.astype(np.float64).sum())

    def add_phones(self, labels: npt.NDArray[np.int64], phones: Sequence[tuple[str, int, int]]) -> None:
        """phones: (phone, first frame, frame after the last)."""
        for phone, begin, end in phones:
            row = self.joint.setdefault(phone, np.zeros_like(self.counts))
            row += np.bincount(labels[begin:end], minlength=len(self.counts))

    def save(self, path: Path) -> None:
        """Save the sums so far, for `add_saved`."""
        file = io.BytesIO()
        rows = np.array(list(self.joint.values()), dtype=np.int64).reshape(-1, len(self.counts))
        np.savez(file, counts=self.counts, inertia=self.inertia, phones=np.array(list(self.joint), str), joint=rows)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, file.getvalue())

    def add_saved(self, path: Path) -> None:
        """Add sums that were written by `save`."""
        with np.load(path) as saved:
            self.counts += saved["counts"]
            self.inertia += float(saved["inertia"])
            for phone, row in zip(saved["phones"].tolist(), saved["joint"], strict=True):
                self.joint.setdefault(phone, np.zeros_like(self.counts))[:] += row

    def report(self) -> dict[str, Any]:
        """Compute the measures. Phone measures are included only if phones with times were added."""
        frames, used = int(self.counts.sum()), self.counts[self.counts > 0]
        shares = used / max(frames, 1)
        found: dict[str, Any] = {
            "frames": frames,
            "clusters": len(self.counts),
            "clusters_used": len(used),
            "perplexity": float(np.exp(-(shares * np.log(shares)).sum())),
            "largest_share": float(shares.max(initial=0.0)),
            "inertia_per_frame": self.inertia / max(frames, 1),
        }
        if self.joint:
            found |= phone_measures(np.stack(list(self.joint.values())))
        return found


def phone_measures(joint: npt.NDArray[np.int64]) -> dict[str, float]:
    """Compute HuBERT's measures (Hsu et al. 2021, section 5.2) from frame counts [phones, clusters].

    phone_purity: fraction of frames whose phone is the most common one of their cluster. cluster_purity: the same with
    the roles exchanged. pnmi: I(phone; cluster) / H(phone), the phone-normalised mutual information.
    """
    p = joint / joint.sum()
    phone, cluster = p.sum(1, keepdims=True), p.sum(0, keepdims=True)
    there = p > 0
    information = float((p[there] * np.log(p[there] / (phone @ cluster)[there])).sum())
    entropy = float(-(phone[phone > 0] * np.log(phone[phone > 0])).sum())
    return {
        "phone_frames": int(joint.sum()),
        "phones": len(joint),
        "phone_purity": float(p.max(0).sum()),
        "cluster_purity": float(p.max(1).sum()),
        "pnmi": information / entropy if entropy > 0 else 0.0,
    }
