"""Accuracy of plain log-mel features on the sample corpus: `python -m codecssl.superb.sample.measure FOLDER`.

A sanity check of the data, not SUPERB: each task must be learnable, and none may be solved by an averaged
spectrum. Chance is what a constant or random answer gets. `--ctc` adds pr, asr and sf by a small BLSTM
(minutes on a CPU).
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter, defaultdict
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from codecssl.superb.rows import ManifestRow
from codecssl.superb.sample.unpack import manifest_rows
from codecssl.tokenize.common.errors import UserError

Array = npt.NDArray[Any]
HOP = 160
"""Samples per frame: 10 ms, as fbank in SUPERB."""


class SampleCorpus:
    """Rows by task and split, with their log-mel frames computed once."""

    def __init__(self, folder: Path) -> None:
        self.rows = manifest_rows(folder)
        self._frames: dict[str, Array] = {}

    def of(self, task: str, split: str) -> list[ManifestRow]:
        return [row for row in self.rows if row["splits"].get(task) == split]

    def frames(self, row: ManifestRow) -> Array:
        """Return the log-mel frames [T, 40] of one utterance."""
        if row["path"] not in self._frames:
            import librosa
            import soundfile

            wave, rate = soundfile.read(row["path"], dtype="float32")
            mel = librosa.feature.melspectrogram(y=wave, sr=rate, n_fft=400, hop_length=HOP, n_mels=40)
            self._frames[row["path"]] = np.log(mel.T + 1e-8).astype(np.float32)
        return self._frames[row["path"]]

    def pooled(self, rows: list[ManifestRow]) -> Array:
        return np.stack([self.frames(row).mean(axis=0) for row in rows])


def accuracy(corpus: SampleCorpus, task: str, column: str) -> tuple[float, float]:
    """Return (chance, accuracy) of a logistic regression on mean log-mel. A dict label must be entirely correct."""
    train, test = corpus.of(task, "train"), corpus.of(task, "test")
    first = train[0][column]
    slots = list(first) if isinstance(first, dict) else [None]
    right = np.ones(len(test), bool)
    for slot in slots:
        label = [str(row[column][slot] if slot else row[column]) for row in train]
        truth = np.array([str(row[column][slot] if slot else row[column]) for row in test])
        right &= _classify(corpus.pooled(train), label, corpus.pooled(test)) == truth
    return _chance(train, test, column), float(right.mean())


def _chance(train: list[ManifestRow], test: list[ManifestRow], column: str) -> float:
    """Return the accuracy of always answering the most frequent training label."""
    common = Counter(str(row[column]) for row in train).most_common(1)[0][0]
    return float(np.mean([str(row[column]) == common for row in test]))


def _classify(train: Array, labels: list[str], test: Array) -> Array:
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000))
    return np.asarray(model.fit(train, labels).predict(test))


def equal_error_rate(corpus: SampleCorpus) -> float:
    """Return the EER of asv over all test pairs, by cosine after LDA on the training speakers. Chance is 0.5."""
    from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

    train, test = corpus.of("asv", "train"), corpus.of("asv", "test")
    model = LinearDiscriminantAnalysis(solver="eigen", shrinkage="auto")
    model.fit(corpus.pooled(train), [row["speaker"] for row in train])
    vectors = model.transform(corpus.pooled(test))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    pairs = list(combinations(range(len(test)), 2))
    scores = np.array([vectors[a] @ vectors[b] for a, b in pairs])
    same = np.array([test[a]["speaker"] == test[b]["speaker"] for a, b in pairs])
    thresholds = np.quantile(scores, np.linspace(0, 1, 1001))
    miss = np.array([np.mean(scores[same] < t) for t in thresholds])
    alarm = np.array([np.mean(scores[~same] >= t) for t in thresholds])
    best = int(np.argmin(np.abs(miss - alarm)))
    return float((miss[best] + alarm[best]) / 2)


def voices_at_once(corpus: SampleCorpus) -> tuple[float, float]:
    """Return (chance, accuracy) of the number of speakers (0 to 2) per frame of sd. Context: ten frames per side."""
    features: dict[str, list[Array]] = defaultdict(list)
    counts: dict[str, list[Array]] = defaultdict(list)
    for split in ("train", "test"):
        for row in corpus.of("sd", split):
            frames = np.pad(corpus.frames(row), ((10, 10), (0, 0)), mode="edge")
            length = len(frames) - 20
            times = np.arange(length) * HOP / 16_000
            features[split].append(np.hstack([frames[shift : shift + length] for shift in (0, 5, 10, 15, 20)]))
            spans = [(times >= s["start"]) & (times < s["end"]) for s in row["segments"]]
            counts[split].append(np.sum(spans, axis=0).astype(str))
    train, test = np.concatenate(counts["train"])[::5], np.concatenate(counts["test"])
    guess = _classify(np.concatenate(features["train"])[::5], list(train), np.concatenate(features["test"]))
    common = Counter(train).most_common(1)[0][0]
    return float(np.mean(test == common)), float(np.mean(guess == test))


def query_precision(corpus: SampleCorpus) -> tuple[float, float]:
    """Return (chance, mean average precision) of qbe on test. Documents are ranked by the cost of subsequence DTW."""
    import librosa

    rows = corpus.of("qbe", "test")
    documents = [row for row in rows if row["role"] == "document"]
    found, chance = [], []
    for query in (row for row in rows if row["role"] == "query"):
        costs = []
        for document in documents:
            pair = [_standardised(corpus.frames(row)).T for row in (query, document)]
            total, _ = librosa.sequence.dtw(*pair, metric="cosine", subseq=True)
            costs.append(total[-1].min() / pair[0].shape[1])
        hits = np.array([query["query"] in row["queries"] for row in documents])[np.argsort(costs)]
        found.append(np.mean(np.cumsum(hits)[hits] / (np.flatnonzero(hits) + 1)))
        chance.append(hits.mean())
    return float(np.mean(chance)), float(np.mean(found))


def _standardised(frames: Array) -> Array:
    return np.asarray((frames - frames.mean(axis=0)) / (frames.std(axis=0) + 1e-5))


def ctc_error_rate(corpus: SampleCorpus, task: str, *, epochs: int) -> float:
    """Return the test error rate (phones for pr, else characters) of a small BLSTM with CTC, decoded greedily."""
    import torch
    from torch import nn

    torch.manual_seed(0)
    train = [(_stacked(corpus.frames(row)), _symbols(row, task)) for row in corpus.of(task, "train")]
    names = sorted({symbol for _, symbols in train for symbol in symbols})
    body = nn.LSTM(120, 128, num_layers=2, bidirectional=True, batch_first=True)
    head = nn.Linear(256, 1 + len(names))
    optimizer = torch.optim.AdamW([*body.parameters(), *head.parameters()], lr=2e-3)
    order = np.random.default_rng(0)
    for _ in range(epochs):
        for chosen in np.array_split(order.permutation(len(train)), max(1, len(train) // 8)):
            inputs = [torch.from_numpy(train[i][0]) for i in chosen]
            targets = [torch.tensor([1 + names.index(symbol) for symbol in train[i][1]]) for i in chosen]
            hidden, _ = body(nn.utils.rnn.pad_sequence(inputs, batch_first=True))
            frames, symbols = (torch.tensor([len(one) for one in group]) for group in (inputs, targets))
            logits = head(hidden).log_softmax(-1).transpose(0, 1)
            loss = nn.functional.ctc_loss(logits, torch.cat(targets), frames, symbols, zero_infinity=True)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(body.parameters(), 1.0)
            optimizer.step()
    errors = length = 0
    for row in corpus.of(task, "test"):
        with torch.no_grad():
            best = head(body(torch.from_numpy(_stacked(corpus.frames(row)))[None])[0])[0].argmax(-1).tolist()
        recognised = [names[now - 1] for now, last in zip(best, [0, *best], strict=False) if now and now != last]
        errors += edit_distance(recognised, _symbols(row, task))
        length += len(_symbols(row, task))
    return errors / length


def _stacked(frames: Array) -> Array:
    """Standardise frames [T, 40] and stack three each to [T // 3, 120]."""
    frames = _standardised(frames)[: len(frames) // 3 * 3]
    return frames.reshape(-1, 120)


def _symbols(row: ManifestRow, task: str) -> list[str]:
    return list(row["phones"] if task == "pr" else row["text"])


def edit_distance(one: list[str], other: list[str]) -> int:
    """Return the Levenshtein distance: the minimum number of insertions, deletions and substitutions."""
    costs = list(range(len(other) + 1))
    for row, left in enumerate(one, 1):
        diagonal, costs[0] = costs[0], row
        for column, right in enumerate(other, 1):
            diagonal, costs[column] = (
                costs[column],
                min(costs[column] + 1, costs[column - 1] + 1, diagonal + (left != right)),
            )
    return costs[-1]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m codecssl.superb.sample.measure", description=__doc__)
    parser.add_argument("folder", type=Path, help="the unpacked corpus")
    parser.add_argument(
        "--ctc", type=int, metavar="EPOCHS", default=0, help="also train models of pr, asr and sf for this long"
    )
    arguments = parser.parse_args(argv)
    try:
        corpus = SampleCorpus(arguments.folder)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for task, column in (
        ("ks", "keyword"),
        ("digits", "digit"),
        ("sid", "speaker"),
        ("er", "style"),
        ("ic", "slots"),
    ):
        chance, value = accuracy(corpus, task, column)
        print(f"{task:7} accuracy   {value:.3f}  chance {chance:.3f}", flush=True)
    print(f"asv     EER        {equal_error_rate(corpus):.3f}  chance 0.500", flush=True)
    chance, value = voices_at_once(corpus)
    print(f"sd      frame acc. {value:.3f}  chance {chance:.3f}", flush=True)
    chance, value = query_precision(corpus)
    print(f"qbe     mean av.p. {value:.3f}  chance {chance:.3f}", flush=True)
    for task in ("pr", "asr", "sf") if arguments.ctc else ():
        value = ctc_error_rate(corpus, task, epochs=arguments.ctc)
        print(f"{task:7} error rate {value:.3f}  chance 1.000 (nothing recognised)", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
