"""pipeline.sh on a real Slurm: audio to report by dependent jobs; the second call submits nothing."""

import json
import shlex
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

TINY = {
    "model": {"dim": 32, "layers": 2, "heads": 2, "ffn_dim": 48, "positions": "rotary"},
    "data": {"batch_frames": 1500, "crop_frames": 100, "valid_fraction": 0.1, "valid_frames": 500},
    "optim": {"steps": 6, "lr": 1e-3},
    "log": {"log_every": 2, "valid_every": 6, "checkpoint_every": 3},
}


@pytest.fixture
def few(sample: Path, folder: Path) -> Path:
    """A folder with a short list for pretraining, and few short words for three tasks (gender as style)."""
    few = folder / "few"
    few.mkdir()
    some = [json.loads(line) for line in (sample / "pretrain.jsonl").read_text().splitlines()[:60]]
    some = [row | {"path": str(sample / row["path"])} for row in some]
    (folder / "some.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
    kept: list[dict[str, Any]] = []
    rows = [json.loads(line) for line in (sample / "manifest.jsonl").read_text().splitlines()]
    seen: Counter[str] = Counter()
    for row in rows:
        if row.get("keyword") in ("yes", "no", "up") and row["speaker"] <= "spk05" and seen[row["keyword"]] < 24:
            split = ("train", "train", "valid", "test")[seen[row["keyword"]] % 4]
            seen[row["keyword"]] += 1
            row |= {"path": str(sample / row["path"]), "style": row["gender"], "task": "ks,sid,er"}
            row["splits"] = dict.fromkeys(("ks", "sid", "er"), split)
            kept.append(row)
    known = {row["speaker"] for row in kept if row["splits"]["sid"] == "train"}
    (few / "manifest.jsonl").write_text("".join(json.dumps(r) + "\n" for r in kept if r["speaker"] in known))
    return few


def test_audio_to_report_by_dependent_jobs_and_a_second_call_submits_nothing(cluster, folder, few):
    work = folder / "pipeline"
    (folder / "first.yaml").write_text(yaml.safe_dump(TINY))
    (folder / "second.yaml").write_text(yaml.safe_dump({**TINY, "objective": {"target": "labels"}}))
    settings = {
        "WORK": str(work),
        "SOURCES": str(folder / "some.jsonl"),
        "TOKENIZE": "--tasks 2 --shard-inputs 30",
        "PRETRAIN": f"--nodes 1 --gpus 0 {folder / 'first.yaml'}",
        "ROUNDS": "1",
        "LABEL": "--tasks 2 --layer 1 --clusters 8 --sample-frames 1000",
        "PRETRAIN_LABELS": f"{folder / 'second.yaml'}",
        "SUPERB": f"--tasks ks,sid,er --lr 1e-2,1e-3 --data {few} --budget smoke",
    }
    (folder / "settings.sh").write_text("".join(f"{key}={shlex.quote(value)}\n" for key, value in settings.items()))
    first = pipeline(cluster, folder)
    assert "6 stages submitted" in first
    twice = pipeline(cluster, folder)
    assert "0 stages submitted" in twice, "must submit nothing while the jobs wait or run"
    assert "run-1: job" in twice
    cluster.wait(*{job.partition("_")[0] for job in cluster.jobs()}, seconds=1200)
    assert "0 stages submitted" in pipeline(cluster, folder), "must submit nothing when all is done"

    for name in ("shards/dataset.json", "labels-1/report.json", "model/model.safetensors", "superb/report.html"):
        assert (work / name).exists(), name
    assert sorted(p.name for p in (work / "done").iterdir() if p.suffix != ".settings") == sorted(
        ["shards", "run-0", "labels-1", "run-1", "model", "superb"]
    )
    results = [json.loads(line) for line in (work / "superb/results.jsonl").read_text().splitlines()]
    found = {(row["task"], row["learning_rate"]) for row in results}
    assert found == {(task, rate) for task in ("ks", "sid", "er") for rate in (1e-2, 1e-3)}
    logs = [path.read_text() for path in (work / "logs").glob("*-superb-*_*.out")]
    assert len(logs) == 6
    assert all("1 runs, 0 finished before" in log for log in logs), "each element must have one run"
    assert np.isfinite([row["loss"] for row in map(json.loads, (work / "run-1/metrics.jsonl").open())]).all()

    trained = (work / "run-1/checkpoints/latest").resolve()
    (work / "done/model").unlink()
    again = pipeline(cluster, folder)
    assert "1 stages submitted" in again, "must submit only the missing stage"
    cluster.wait(max((job.partition("_")[0] for job in cluster.jobs()), key=int), seconds=300)
    assert (work / "run-1/checkpoints/latest").resolve() == trained


def pipeline(cluster, folder: Path) -> str:
    """Output of the pipeline."""
    script = Path(__file__).resolve().parents[2] / "slurm/pipeline.sh"
    return cluster.call("bash", "-c", f"bash {script} settings.sh 2>&1", cwd=folder)
