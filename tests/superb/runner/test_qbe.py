"""Query by example: scores are those of s3prl's quesst14_dtw, the layer is chosen on the valid queries."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from lxml import etree

from codecssl.superb.corpora.corpus import Example, TaskCorpus
from codecssl.superb.patches import import_patches
from codecssl.superb.runner import qbe
from codecssl.superb.runner.qbe import BETA, mtwv
from codecssl.superb.tasks import TASKS
from codecssl.tokenize.common.errors import UserError


def test_scores_equal_those_of_s3prl(tmp_path: Path) -> None:
    """s3prl's expert writes an XML list with four decimals. A query of four frames has no detection."""
    import_patches.install()
    from s3prl.downstream.quesst14_dtw.expert import DownstreamExpert

    draw = torch.Generator().manual_seed(0)
    clips = [torch.randn(length, 8, generator=draw) for length in (12, 7, 4, 40, 25, 31, 18)]
    rules = {"step_pattern": "asymmetric", "minmax_norm": True, "subsequence": True, "dist_method": "cosine"}
    settings = {"max_workers": 1, "feature_normalization": True, "silence_frame": None, "datarc": {}, "dtwrc": rules}
    expert = DownstreamExpert(8, settings, str(tmp_path))
    expert.test_dataset = SimpleNamespace(n_queries=3)
    expert.log_records("dev", {"features": clips, "audio_names": [f"c{i}" for i in range(7)]})
    lists = {item.get("termid"): item for item in etree.parse(tmp_path / "benchmark.stdlist.xml").getroot()}
    theirs = [[float(lists[f"c{q}"].find(f"term[@file='c{d}']").get("score")) for d in range(3, 7)] for q in range(3)]

    frames = torch.cat(clips)
    normed = [((clip - frames.mean(0)) / frames.std(0)).numpy() for clip in clips]
    ours = qbe.scores(normed[:3], normed[3:])
    assert abs(ours - np.array(theirs)).max() < 1e-4
    assert abs(qbe.scores(normed[:3], normed[3:], workers=1) - ours).max() == 0


class SpectrumLayers(torch.nn.Module):
    """Layer 0 is independent of the pitch, layer 1 is a spectrum."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, wavs: list[torch.Tensor]) -> dict[str, Any]:
        self.calls += 1
        (wav,) = wavs
        frames = wav[: len(wav) // 800 * 800].view(1, -1, 800)
        spectrum = torch.fft.rfft(frames).abs()[..., :100]
        noise = torch.randn(spectrum.shape, generator=torch.Generator().manual_seed(len(wav)))
        return {"hidden_states": [noise, spectrum]}


def test_the_best_valid_layer_is_tested_and_searched_layers_are_kept(corpus: Path, tmp_path: Path) -> None:
    splits = TaskCorpus(corpus).examples(TASKS["qbe"])
    upstream = SpectrumLayers()
    row = qbe.evaluate(splits, upstream, tmp_path, pairs=None)
    assert row["chosen"]["layer"] == 1
    assert row["valid"] == pytest.approx(max(row["chosen"]["valid_by_layer"]), abs=1e-5)
    kept = np.load(tmp_path / "test-01.npy")
    assert row["value"] == row["values"]["mtwv"] == mtwv(kept, qbe.searches(splits)["test"].truth)[0] > 0
    assert row["chosen"]["queries_and_documents"] == {"valid": [3, 3], "test": [3, 3]}
    calls = upstream.calls
    assert qbe.evaluate(splits, upstream, tmp_path, pairs=None) == row
    assert upstream.calls == calls


def example(name: str, **columns: Any) -> Example:
    return Example(id=name, path=Path(name), columns=columns)


def test_a_sample_is_limited_and_deterministic() -> None:
    documents = [example(f"d{i}", role="document", queries=["a", "b"][: i % 3]) for i in range(90)]
    queries = [example(f"q{i}", role="query", query="ab"[i % 2]) for i in range(40)] + [
        example("lost", role="query", query="none")
    ]
    whole = qbe.searches({"test": documents + queries})["test"]
    assert (len(whole.queries), len(whole.documents)) == (41, 90)
    assert whole.truth.shape == (41, 90)
    assert not whole.truth[40].any()
    assert whole.truth[0].tolist() == [i % 3 > 0 for i in range(90)]
    few = [qbe.searches({"test": documents + queries}, pairs=600)["test"] for _ in range(2)]
    assert len(few[0].queries) * len(few[0].documents) <= 600
    assert few[0] == few[1]
    assert queries[-1] not in few[0].queries


def test_queries_in_no_document_are_an_error() -> None:
    with pytest.raises(UserError, match="no valid document holds a valid query"):
        qbe.searches({"valid": [example("q", role="query", query="a"), example("d", role="document", queries=[])]})


def test_silent_frames_have_a_distance() -> None:
    assert qbe.scores([np.zeros((6, 3))], [np.ones((9, 3)), np.zeros((9, 3))]).tolist() == [[0.0, 0.0]]


def naive_mtwv(scores: np.ndarray, truth: np.ndarray, beta: float) -> float:
    best = 0.0
    for threshold in sorted(set(scores.ravel().tolist())):
        values = []
        for row, held in zip(scores, truth, strict=True):
            if not held.any():
                continue
            found = [score >= threshold for score in row]
            missed = sum(h and not f for h, f in zip(held, found, strict=True)) / sum(held)
            others = len(held) - sum(held)
            false = sum(f and not h for h, f in zip(held, found, strict=True)) / others if others else 0.0
            values.append(1 - (missed + beta * false))
        if values:
            best = max(best, sum(values) / len(values))
    return best


def test_beta_matches_quesst_2014() -> None:
    """QUESST's scoring tool is called with an effective prior of 0.0741289."""
    assert pytest.approx(12.49) == BETA
    assert pytest.approx(0.0741289, abs=1e-7) == 1 / (1 + BETA)


@pytest.mark.parametrize("seed", range(20))
def test_mtwv_is_the_maximum_over_all_thresholds(seed: int) -> None:
    """Random scores with ties, queries contained in no or in every document, several betas; oracle: plain loops."""
    draw = np.random.default_rng(seed)
    truth = draw.random((6, 15)) < 0.3
    truth[0], truth[1] = False, seed % 2 == 0
    scores = (draw.normal(size=truth.shape) + 2 * truth).round(1)
    for beta in (0.0, 1.0, BETA):
        value, threshold = mtwv(scores, truth, beta)
        assert value == pytest.approx(naive_mtwv(scores, truth, beta), abs=1e-12)
        assert threshold in set(scores.ravel().tolist()) | {float("inf")}


def test_mtwv_of_perfect_inverted_and_empty_searches() -> None:
    truth = np.array([[True, False], [False, True]])
    assert mtwv(truth.astype(float), truth) == (1.0, 1.0)
    assert mtwv(1.0 - truth, truth) == (0.0, float("inf"))
    assert mtwv(np.zeros((2, 2)), np.zeros((2, 2), bool)) == (0.0, float("inf"))
