"""Data of a task codec: token shards with label columns, split into training, validation and test parts."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from codecssl.superb.mini.recorded_tasks import plain_phones
from codecssl.superb.probe.crossvalidate import assign_folds
from codecssl.superb.probe.probe import Probe, check, load_probes
from codecssl.superb.rows import ManifestRow
from codecssl.superb.tasks import TASKS
from codecssl.tokenize.codec import CodecCard
from codecssl.tokenize.common.errors import UserError
from codecssl.tokenize.shards import Shards

PARTS = ("train", "valid", "test")
FOLDS = 4
"""Folds, each the test part once, if rows name no split."""
VALID = 0.15
"""Share of the remaining utterances for validation, which selects the checkpoint."""
SPOKEN = ("pr",)
"""SUPERB tasks answered by a sequence of labels (CTC)."""
SPEAKER_APART = ("pr", "ks", "ic", "er")
"""SUPERB tasks whose test speakers are unseen in training, if rows name speakers."""


@dataclass(frozen=True, kw_only=True)
class Examples:
    """Labelled utterances of one task."""

    kind: str
    """`class`, `ctc`, or `none`."""
    names: tuple[str, ...]
    """Names of the labels. For ctc the first is the blank."""
    labels: dict[int, tuple[int, ...]]
    """Labels of each utterance."""
    parts: dict[str, tuple[int, ...]]
    """Utterances of the parts train, valid and test."""
    apart: str | None = None
    """Column whose values train and test do not share."""
    folds: int = FOLDS
    """Number of folds, one of which is the test part. 1 if rows name their parts."""


def open_shards(data: Path, card: CodecCard, work: Path, device: str) -> Shards:
    """Open token shards. Those of a manifest are made in `work` first. Raises UserError for shards of another codec."""
    if not (data / "dataset.json").is_file():
        data = _tokenised(data, card, work / "tokens", device)
    shards = Shards(data)
    theirs = shards.card
    if (card.weights_sha256, card.codebook_sizes) != (theirs.weights_sha256, theirs.codebook_sizes):
        raise UserError(f"{data}: was written with another codec than the model's ({card.difference(theirs)})")
    return shards


def _tokenised(data: Path, card: CodecCard, output: Path, device: str) -> Path:
    from codecssl.tokenize.config import TokenizeConfig
    from codecssl.tokenize.registry import load_codec_for, named_source
    from codecssl.tokenize.run import run

    manifest = data / "manifest.jsonl" if data.is_dir() else data
    if not manifest.is_file():
        raise UserError(f"data {data}: neither token shards nor a manifest.jsonl nor a folder with one")
    if not (output / "dataset.json").is_file():
        options: dict[str, Any] = {"num_codebooks": card.num_codebooks, "device": device, "workers": 0}
        codec = named_source(card, load_codec_for(card).card.weights)
        run(TokenizeConfig(sources=(str(manifest),), output=output, codec=codec, **options))
    return output


def examples(shards: Shards, task: str, probes: str, seed: int, fold: int = 0) -> Examples:
    """Utterances of a task: a probe's name; ks, ic, sid, er or pr of SUPERB; or none.

    Phones lose their stress and their position in the word (AA0_B becomes AA). The column `splits` names the parts.
    Without it, the seed draws four folds, `fold` is the test part, and 15 % of the rest are the validation part.
    """
    rows: list[ManifestRow] = [{"path": u.path, **u.labels} for u in shards.utterances()]
    if task == "none":
        return _unlabelled(len(rows), seed)
    probe, answers = _choose(rows, task, probes)
    taken = sorted(answers)
    names = sorted({name for row in answers.values() for name in row})
    kind = "ctc" if task in SPOKEN else "class"
    names = ["<blank>", *names] if kind == "ctc" else names
    number = {name: i for i, name in enumerate(names)}
    labels = {i: tuple(number[name] for name in answers[i]) for i in taken}
    named = _named_parts(rows, taken, task)
    parts = named or _drawn_parts(rows, taken, answers, probe, kind, seed, fold)
    folds = 1 if named else FOLDS
    return Examples(kind=kind, names=tuple(names), labels=labels, parts=parts, apart=probe.group, folds=folds)


def _unlabelled(count: int, seed: int) -> Examples:
    order = np.random.default_rng(seed).permutation(count).tolist()
    cut = max(1, count // 20)
    if count < 3:
        raise UserError(f"data: {count} utterances, at least 3 are needed")
    parts = {"train": tuple(sorted(order[2 * cut :])), "valid": tuple(order[:cut]), "test": tuple(order[cut : 2 * cut])}
    return Examples(kind="none", names=(), labels=dict.fromkeys(range(count), ()), parts=parts, folds=1)


def _choose(rows: Sequence[ManifestRow], task: str, probes: str) -> tuple[Probe, dict[int, tuple[str, ...]]]:
    """Return the rows of the task, and the labels of each row by name."""
    known = {probe.name: probe for probe in load_probes(probes)}
    if task in known:
        probe = known[task]
        taken = [i for i, row in enumerate(rows) if probe.takes(row)]
        found: dict[int, tuple[str, ...]] = {i: (str(rows[i][probe.label]),) for i in taken if rows[i].get(probe.label)}
    elif task in (*SPOKEN, "ks", "ic", "sid", "er"):
        apart = task in SPEAKER_APART
        probe = Probe(name=task, label=task, task=task, group="speaker" if apart else None)
        taken = [i for i, row in enumerate(rows) if probe.takes(row)]
        found = {i: _superb_label(rows[i], task) for i in taken}
    else:
        raise UserError(f"task {task}: give none, pr, ks, ic, sid, er, or one of the probes {', '.join(known)}")
    if not found:
        raise UserError(f"task {task}: no utterance in the data has both this task and its label")
    if probe.group and any(rows[i].get(probe.group) is None for i in found):
        probe = Probe(name=probe.name, label=probe.label, task=probe.task)
    return probe, found


def _superb_label(row: ManifestRow, task: str) -> tuple[str, ...]:
    columns = TASKS[task].columns
    try:
        found = {key: value for key, value in columns(row).items() if key not in ("start_sec", "end_sec")}
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"task {task}: {row['path']} lacks its column ({error})") from error
    label = str(next(iter(found.values())))
    return tuple(plain_phones(label)) if task in SPOKEN else (label,)


def _named_parts(rows: Sequence[ManifestRow], taken: Sequence[int], task: str) -> dict[str, tuple[int, ...]] | None:
    named = {i: (rows[i].get("splits") or {}).get(task) for i in taken}
    if not all(part in PARTS for part in named.values()):
        return None
    parts = {part: tuple(i for i in taken if named[i] == part) for part in PARTS}
    return parts if all(parts.values()) else None


def _drawn_parts(
    rows: Sequence[ManifestRow],
    taken: Sequence[int],
    answers: dict[int, tuple[str, ...]],
    probe: Probe,
    kind: str,
    seed: int,
    fold: int,
) -> dict[str, tuple[int, ...]]:
    strata = np.array([answers[i][0] if kind == "class" else "" for i in taken])
    groups = np.array([str(rows[i][probe.group]) for i in taken]) if probe.group else None
    if kind == "class":
        check(probe, strata, groups, FOLDS)
    tested = assign_folds(strata, groups, FOLDS, seed) == fold
    rest = np.random.default_rng(seed).permutation(np.flatnonzero(~tested))
    cut = max(1, round(VALID * len(rest)))
    chosen = {"test": np.flatnonzero(tested), "valid": rest[:cut], "train": rest[cut:]}
    return {part: tuple(sorted(taken[i] for i in chosen[part].tolist())) for part in PARTS}


def refuse_too_few_frames(found: Examples, frames: Sequence[int], bit_rate: Any) -> Examples:
    """For ctc, drop utterances with fewer frames of codes than labels and repeats.

    A frame gives one label, and a repeat needs a blank before it. Raises UserError if more than 1 % are dropped.
    """
    if found.kind != "ctc":
        return found
    short = {i for i, row in found.labels.items() if frames[i] < len(row) + repeats(row)}
    if len(short) > 0.01 * len(found.labels):
        raise UserError(
            f"rate {bit_rate}: {len(short)} of {len(found.labels)} utterances have fewer frames of codes than labels "
            "and repeats, which CTC cannot answer; give a higher --frame-rate"
        )
    parts = {part: tuple(i for i in rows if i not in short) for part, rows in found.parts.items()}
    return replace(found, parts=parts)


def repeats(row: Sequence[int]) -> int:
    """Number of labels that equal the previous one."""
    return sum(a == b for a, b in pairwise(row))
