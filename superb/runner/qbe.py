"""Query by example: search every query in every document by dynamic time warping, per layer.

Follows s3prl's quesst14_dtw, with a separate implementation of the matching. Waves are attenuated by 3 dB, and features
are normalised per dimension over the queries and documents of a set. The matching uses the cosine distance, rows of
distances scaled to [0, 1], asymmetric steps, and open begin and end. Scores are normalised per query. The layer is
chosen on the development queries (valid).
"""

import contextlib
import random
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from codecssl.superb import results
from codecssl.superb.corpora.corpus import Example
from codecssl.superb.rows import ResultRow
from codecssl.superb.runner.workers import in_workers
from codecssl.superb.tokens.waves import load_qbe
from codecssl.tokenize.common.errors import UserError

BETA = (1 / 100) * (1 / 0.0008 - 1)
"""Weight of a false alarm, (Cfa / Cmiss) * (1 / Ptarget - 1), with the costs of QUESST 2014's scoring: Cfa 1, Cmiss
100, Ptarget 0.0008, that is 12.49. (Its tool names the same as an effective prior, 0.0741289; SWS 2013 had 66.66.)"""
LEAST_FRAMES = 5  # of a query; s3prl finds shorter ones nowhere


@dataclass(frozen=True, kw_only=True)
class Search:
    """The queries and documents of one split."""

    queries: list[Example]
    documents: list[Example]

    @property
    def truth(self) -> np.ndarray:
        """Return bool [queries, documents], true if the document contains the query."""
        held = [set(document.columns["queries"]) for document in self.documents]
        return np.array([[query.columns["query"] in names for names in held] for query in self.queries])


def searches(splits: dict[str, list[Example]], pairs: int | None = None, seed: int = 0) -> dict[str, Search]:
    """Build a search per split.

    `pairs` limits the pairs by sampling queries, and documents if fewer than ten queries would remain. The sample
    leaves out queries that no document contains, since they can't be scored.
    """
    return {split: _search(split, examples, pairs, seed) for split, examples in splits.items()}


def _search(split: str, examples: list[Example], pairs: int | None, seed: int) -> Search:
    documents = [e for e in examples if e.columns["role"] == "document"]
    named = {name for document in documents for name in document.columns["queries"]}
    queries = [e for e in examples if e.columns["role"] == "query"]
    scored = [e for e in queries if e.columns["query"] in named]
    if not scored:
        raise UserError(f"task qbe: no {split} document holds a {split} query; give documents with queries")
    if pairs is not None and len(queries) * len(documents) > pairs:
        queries = scored
        draw = random.Random(seed)
        documents = _some(documents, pairs // min(10, len(queries)), draw)
        queries = _some(queries, max(1, pairs // len(documents)), draw)
    return Search(queries=queries, documents=documents)


def _some(examples: list[Example], count: int, draw: random.Random) -> list[Example]:
    if len(examples) <= count:
        return examples
    return [examples[i] for i in sorted(draw.sample(range(len(examples)), count))]


def evaluate(splits: dict[str, list[Example]], upstream: Any, folder: Path, *, pairs: int | None, workers: int = 0,
             device: str = "cpu") -> ResultRow:  # fmt: skip
    """Return the result row: MTWV of the test queries for the layer that is best on the validation queries.

    `best_step` is None. Layers that were searched before are read from `folder`.
    """
    both = searches(splits, pairs)
    valid: list[float] = []
    layers = 1
    while len(valid) < layers:
        path = folder / f"valid-{len(valid):02d}.json"
        value, layers = _value(both["valid"], upstream, len(valid), path, workers, device)
        valid.append(value)
    best = int(np.argmax(valid))
    value, _ = _value(both["test"], upstream, best, folder / f"test-{best:02d}.json", workers, device)
    sizes = {split: [len(search.queries), len(search.documents)] for split, search in both.items()}
    chosen = {"layer": best, "valid_by_layer": [round(v, 5) for v in valid], "queries_and_documents": sizes}
    return {"value": value, "values": {"mtwv": value}, "valid": valid[best], "best_step": None, "chosen": chosen,
            "layer_weights": None, "curves": {}}  # fmt: skip


def _value(search: Search, upstream: Any, layer: int, path: Path, workers: int, device: str) -> tuple[float, int]:
    """Return MTWV and the number of layers, from the file if it exists."""
    known = results.read_json(path)
    if known is None:
        features, layers = _features([*search.queries, *search.documents], upstream, layer, device)
        found = scores(features[: len(search.queries)], features[len(search.queries) :], workers)
        value, threshold = mtwv(found, search.truth)
        known = {"mtwv": value, "threshold": None if threshold == float("inf") else threshold, "layers": layers}
        results.write_json(path, known)
        np.save(path.with_suffix(".npy"), found)
    return float(known["mtwv"]), int(known["layers"])


def _features(examples: Sequence[Example], upstream: Any, layer: int, device: str) -> tuple[list[np.ndarray], int]:
    """Return a layer of each clip, float32 [T, D], normalised over all clips, and the number of layers."""
    clips = []
    for example in examples:
        states = upstream([load_qbe(str(example.path)).to(device)])["hidden_states"]
        clips.append(states[layer][0].float().cpu())
    frames = torch.cat(clips)
    mean, deviation = frames.mean(0), frames.std(0).clamp(min=1e-9)
    return [((clip - mean) / deviation).numpy() for clip in clips], len(states)


def scores(queries: Sequence[np.ndarray], documents: Sequence[np.ndarray], workers: int = 0) -> np.ndarray:
    """Compute scores [queries, documents] from features [T, D].

    Scores of each query have mean 0 and deviation 1 (s3prl's normalisation). `workers` processes share the queries.
    """
    with _shared(documents) as folder:
        rows = _rows_in_workers(queries, folder, workers) if workers else [_row(query, folder) for query in queries]
    found = np.array(rows)
    return (found - found.mean(1, keepdims=True)) / np.clip(found.std(1, keepdims=True), 1e-9, np.inf)


@contextlib.contextmanager
def _shared(documents: Sequence[np.ndarray]) -> Iterator[Path]:
    """Write the documents to memory-mapped files shared by processes. Copies would take gigabytes."""
    with tempfile.TemporaryDirectory() as name:
        np.save(Path(name) / "frames.npy", np.concatenate(documents))
        np.save(Path(name) / "ends.npy", np.cumsum([len(document) for document in documents]))
        yield Path(name)


def _rows_in_workers(queries: Sequence[np.ndarray], folder: Path, workers: int) -> list[np.ndarray]:
    rows = [np.empty(0)] * len(queries)
    with contextlib.closing(in_workers(partial(_numbered_row, folder), list(enumerate(queries)), workers)) as outcomes:
        for (number, _), outcome in outcomes:
            if isinstance(outcome, Exception):
                raise outcome
            rows[number] = outcome
    return rows


def _numbered_row(folder: Path, item: tuple[int, np.ndarray]) -> Iterator[np.ndarray]:
    yield _row(item[1], folder)


def _row(query: np.ndarray, folder: Path) -> np.ndarray:
    """Score a query against every document: the negative normalised cost of the best path."""
    frames, ends = np.load(folder / "frames.npy", mmap_mode="r"), np.load(folder / "ends.npy")
    if len(query) < LEAST_FRAMES:
        return np.zeros(len(ends))
    starts = np.concatenate([[0], ends[:-1]])
    return np.array([_match(query, np.asarray(frames[a:b])) for a, b in zip(starts, ends, strict=True)])


def _match(query: np.ndarray, document: np.ndarray) -> float:
    from codecssl.superb.patches import import_patches

    import_patches.install()
    from s3prl.downstream.quesst14_dtw.expert import match

    steps = {"step_pattern": "asymmetric", "keep_internals": False, "distance_only": False}
    _, _, score = match(query, document, "", "", _cosine, True, {**steps, "open_begin": True, "open_end": True})
    return float(score)


def _cosine(query: np.ndarray, document: np.ndarray) -> np.ndarray:
    """Compute scipy's cosine distance, with 1 for frames of zeros, which scipy leaves undefined."""
    from scipy.spatial import distance

    return np.nan_to_num(distance.cdist(query, document, "cosine"), nan=1.0)


# ---------------------------------------------------------------- scoring


def mtwv(scores: np.ndarray, truth: np.ndarray, beta: float = BETA) -> tuple[float, float]:
    """Compute the maximum term-weighted value (MTWV) and its threshold from scores and truth [queries, documents].

    Defined by NIST (STD 2006 evaluation plan, section 4).

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
