"""The maximum term-weighted value (MTWV) of a search, after NIST's definition (STD 2006 evaluation plan, section 4)."""

import numpy as np

BETA = (1 / 100) * (1 / 0.0008 - 1)
"""Weight of a false alarm, (Cfa / Cmiss) * (1 / Ptarget - 1), with the costs of QUESST 2014's scoring: Cfa 1, Cmiss
100, Ptarget 0.0008, that is 12.49. (Its tool names the same as an effective prior, 0.0741289; SWS 2013 had 66.66.)"""


def mtwv(scores: np.ndarray, truth: np.ndarray, beta: float = BETA) -> tuple[float, float]:
    """Compute the MTWV and its threshold from scores and truth, both [queries, documents].

    TWV(t) = 1 - mean over queries of (P_miss + beta * P_fa), where a pair counts as found if its score is at least
    t. P_miss is a share of the query's true documents, P_fa of the others. MTWV is the maximum over t, and 0 if finding
    nothing is best. Queries without true documents are ignored.
    """
    held = truth.any(axis=1)
    scores, truth = scores[held].astype(np.float64), truth[held]
    if not len(scores):
        return 0.0, float("inf")
    true = truth.sum(axis=1, keepdims=True)
    gain = np.where(truth, 1 / true, -beta / np.maximum(truth.shape[1] - true, 1)) / len(scores)
    order = np.argsort(-scores, axis=None, kind="stable")
    ranked, value = scores.ravel()[order], np.cumsum(gain.ravel()[order])
    ends = np.append(ranked[1:] != ranked[:-1], True)  # pairs with equal scores are found together
    best = int(np.argmax(np.where(ends, value, -np.inf)))
    return (float(value[best]), float(ranked[best])) if value[best] > 0 else (0.0, float("inf"))
