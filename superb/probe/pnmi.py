"""Phone-normalised mutual information (PNMI) of each layer: k-means units of its frames against labels.

PNMI = I(label; unit) / H(label), the share of the label's entropy that the unit removes (Hsu et al. 2021, HuBERT). Half
of the clips fit the k-means, the other half is measured. With few frames the mutual information is biased upwards;
compare upstreams on the same clips and the same number of units only.

The labels are `phones` with times, rows [phone, start, end in seconds], where the clips have them. Elsewhere each clip
is one segment of its class.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from codecssl.pretrain.labels.clustering import Clustering, phone_measures
from codecssl.tokenize.common.errors import UserError
from codecssl.tokenize.common.kmeans import MINIBATCH, fit_centroids

Segment = tuple[str, float, float]
"""Label, and start and end as fractions of the clip."""


def segments_of(row: dict[str, Any], label: str, seconds: float) -> list[Segment]:
    """Return a row's phones with times, or one segment of its class."""
    phones = row.get("phones")
    if isinstance(phones, list) and phones and all(isinstance(one, list) and len(one) == 3 for one in phones):
        return [(str(phone), float(start) / seconds, float(end) / seconds) for phone, start, end in phones]
    return [(label, 0.0, 1.0)]


def layer_pnmi(
    clips: Sequence[NDArray[np.floating]], segments: Sequence[Sequence[Segment]], clusters: int, seed: int
) -> float:
    """PNMI, 0 to 1, of one layer's frames [T_i, D] of each clip. Raises UserError for fewer frames than clusters.

    Even clips fit the k-means, odd ones are measured. Frames outside all segments only take part in the k-means.
    """
    frames = np.concatenate([np.asarray(clip, np.float32) for clip in clips[0::2]])
    if len(frames) < clusters:
        raise UserError(f"--clusters {clusters}: only {len(frames)} frames to cluster; ask for fewer, or more --clips")
    centroids = fit_centroids(frames, clusters, seed=seed, minibatches=len(frames) > MINIBATCH)
    clustering = Clustering(centroids, {})
    joint: dict[str, NDArray[np.int64]] = {}
    for clip, rows in zip(clips[1::2], segments[1::2]):
        units, _ = clustering.assign(np.asarray(clip, np.float32))
        for label, start, end in rows:
            counts = joint.setdefault(label, np.zeros(clusters, np.int64))
            counts += np.bincount(units[round(start * len(units)) : round(end * len(units))], minlength=clusters)
    total = sum(int(counts.sum()) for counts in joint.values())
    if not total:
        raise UserError("PNMI: no labelled frame; give at least two clips")
    return phone_measures(np.stack(list(joint.values())))["pnmi"]
