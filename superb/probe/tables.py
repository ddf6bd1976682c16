"""Tables of finished probes: accuracies, and a paired test of every model against every baseline."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, groupby
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from codecssl.superb import results
from codecssl.superb.paired import LEVEL, sign_flip_p, verdict
from codecssl.superb.reporting.tables import percent
from codecssl.superb.rows import BASELINES, ResultRow

if TYPE_CHECKING:
    from rich.table import Table

HEADER = ["probe", "upstream", "best layer %", "± seeds", "chosen", "optimistic %", "layers %", "chance %"]
HEADER += ["clips", "in pretraining"]
PAIRED_HEADER = ["probe", "upstream", "baseline", "difference", "p", "verdict"]
NOTE = (
    "Best layer: layer and C chosen inside the training folds. Optimistic: the layer that is best on the test folds. "
    "Bold: significantly better than every baseline in the table. In pretraining: the probe's clips whose sha256 is in "
    "the pretraining set. fbank is taken without its per-utterance normalisation, which would leave means of 0."
)
PAIRED_NOTE = (
    "Exact sign-flip test over clips, of right answers summed over the seeds of the folds (McNemar's test for one "
    f"seed); no difference: p of at least {LEVEL}."
)
SEEN = "Clips of the pretraining set: these figures say nothing about unseen audio"


@dataclass(frozen=True, kw_only=True)
class Pair:
    """A model against a baseline on one probe."""

    probe: str
    model: str
    baseline: str
    points: float
    p: float

    @property
    def verdict(self) -> str:
        return verdict(self.points, self.p)


def pairs(rows: Sequence[ResultRow]) -> list[Pair]:
    """Pair each model with each baseline that was tested on the same clips in the same folds."""
    names, found = _names(rows), []
    for _, group in _groups(rows):
        by_probe = groupby(sorted(group, key=_probe_key), key=_probe_key)
        for _, same in ((key, list(rows)) for key, rows in by_probe):
            models = [row for row in same if not _is_baseline(row) and "right" in row]
            baselines = [row for row in same if _is_baseline(row) and "right" in row]
            found += [_pair(one, other, names) for one in models for other in baselines]
    return found


def _pair(one: ResultRow, other: ResultRow, names: dict[str, str]) -> Pair:
    difference = _answers(one) - _answers(other)
    points = 100 * difference.sum() / (len(difference) * len(one["right"]))
    return Pair(
        probe=one["probe"]["name"],
        model=names[_identity(one)],
        baseline=names[_identity(other)],
        points=float(points),
        p=sign_flip_p(difference.tolist()),
    )


def _answers(row: ResultRow) -> np.ndarray:
    """Number of right answers for each clip, summed over seeds."""
    seeds = [np.frombuffer(seed.encode(), np.uint8) - ord("0") for seed in row["right"]]
    return np.stack(seeds).sum(axis=0, dtype=np.int64)


def sections(rows: Sequence[ResultRow]) -> Iterator[tuple[str, list[str], list[list[str]], str]]:
    """Title, header, lines and note of each table."""
    names = _names(rows)
    for title, group in _groups(rows):
        found = pairs(group)
        seen = {row["probe"]["name"] for row in group if _was_seen(row)}
        for of_seen in (False, True):
            shown = [row for row in group if _shown(row, of_seen, seen)]
            marked = f"{SEEN}; {title}" if of_seen else title
            if shown:
                yield marked, HEADER, [_line(row, found, names) for row in shown], NOTE
            models = {(row["probe"]["name"], names[_identity(row)]) for row in shown}
            lines = [_paired_line(pair) for pair in found if (pair.probe, pair.model) in models]
            if lines:
                yield f"Against baselines; {marked}", PAIRED_HEADER, lines, PAIRED_NOTE


def _shown(row: ResultRow, of_seen: bool, seen: set[str]) -> bool:
    """True if a row belongs in the table. Baselines are in the second table if a model of their probe is."""
    if _is_baseline(row):
        return not of_seen or row["probe"]["name"] in seen
    return _was_seen(row) == of_seen


def _line(row: ResultRow, found: Sequence[Pair], names: dict[str, str]) -> list[str]:
    probe, name, value = row["probe"]["name"], names[_identity(row)], percent(row["best_layer"])
    against = [pair.verdict for pair in found if (pair.probe, pair.model) == (probe, name)]
    if against and set(against) == {"better"}:
        value = f"**{value}**"
    chosen = " ".join(f"{layer}x{n}" for layer, n in sorted(Counter(chain(*row["chosen_layers"])).items()))
    line = [probe, name, value, percent(row["best_layer_deviation"]), chosen, percent(row["optimistic_layer"])]
    line += [" ".join(percent(v) for v in row["layers"]), percent(row["chance"])]
    return [*line, f"{row['utterances']}, {row['classes']} classes", _in_pretraining(row)]


def _paired_line(pair: Pair) -> list[str]:
    p = f"{pair.p:.3f}" if pair.p >= 0.001 else "< 0.001"
    return [pair.probe, pair.model, pair.baseline, f"{pair.points:+.1f}", p, pair.verdict]


def _in_pretraining(row: ResultRow) -> str:
    if _is_baseline(row):
        return ""
    if row.get("in_pretraining") is None:
        return "unknown"
    count, total = row["in_pretraining"]
    return f"{count} of {total}" if count else f"none of {total} (unseen)"


def summary(rows: Sequence[ResultRow]) -> list[str]:
    """Write one line per model and baseline, with the numbers of probes where it is better, worse, or not different."""
    found = sorted(pairs(rows), key=lambda pair: (pair.model, _order(pair.baseline), pair.baseline))
    lines = []
    for (model, baseline), group in groupby(found, key=lambda pair: (pair.model, pair.baseline)):
        several = list(group)
        counts = Counter(pair.verdict for pair in several)
        parts = [f"{word} on {counts[word]}" for word in ("better", "worse", "no difference") if counts[word]]
        mean = sum(pair.points for pair in several) / len(several)
        lines.append(
            f"{model} against {baseline}: {', '.join(parts)} of {len(several)} probes; mean {mean:+.1f} points."
        )
    return lines


def console_tables(rows: Sequence[ResultRow]) -> "list[Table | str]":
    """Terminal tables of the requested rows."""
    from rich.table import Table

    found: list[Table | str] = []
    for title, header, lines, note in sections(rows):
        table = Table(*header, title=title, caption=note, caption_justify="left")
        for line in lines:
            table.add_row(*(f"[bold]{cell.strip('*')}[/]" if cell.startswith("**") else cell for cell in line))
        found.append(table)
    return [*found, *summary(rows)]


def write_markdown(output: Path) -> Path:
    """Write probe.md with all finished probes in `output`."""
    rows = results.read_rows(output, "probes")
    parts = ["# Linear probes"]
    for title, header, lines, note in sections(rows):
        table = [header, ["---"] * len(header), *lines]
        parts += [f"## {title}", "\n".join(f"| {' | '.join(line)} |" for line in table), note]
    parts += ["\n".join(f"- {line}" for line in summary(rows))]
    results.write_text(output / "probe.md", "\n\n".join(part for part in parts if part) + "\n")
    return output / "probe.md"


def _groups(rows: Sequence[ResultRow]) -> list[tuple[str, list[ResultRow]]]:
    """Group comparable rows into tables, each with its title."""
    groups: dict[tuple[str, str], list[ResultRow]] = {}
    for row in rows:
        groups.setdefault((_title(row), row["data_fingerprint"]), []).append(row)
    return [(key[0], sorted(group, key=_row_key)) for key, group in sorted(groups.items())]


def _title(row: ResultRow) -> str:
    settings = row["settings"]
    strengths = settings["C"] if isinstance(settings["C"], list) else [settings["C"]]
    C = f"C of {' '.join(f'{value:g}' for value in strengths)}" if len(strengths) > 1 else f"C {strengths[0]:g}"
    pooled = {"meanstd": "mean and deviation over time", "mean": "mean over time"}[settings.get("pool", "mean")]
    seeds = ", ".join(map(str, settings["seeds"]))
    return f"{Path(row['data']).name}: {pooled}, {C}, {settings['folds']} folds, seeds {seeds}"


def _probe_key(row: ResultRow) -> str:
    return str(sorted(row["probe"].items()))


def _row_key(row: ResultRow) -> tuple[str, int, str]:
    kind = row["upstream"]["kind"]
    return row["probe"]["name"], _order(kind), row["upstream"]["name"]


def _order(name: str) -> int:
    kind = name.partition(":")[0].partition(" ")[0]
    return BASELINES.index(kind) if kind in BASELINES else len(BASELINES)


def _is_baseline(row: ResultRow) -> bool:
    return row["upstream"]["kind"] in BASELINES


def _was_seen(row: ResultRow) -> bool:
    return bool(row.get("in_pretraining") and row["in_pretraining"][0])


def _identity(row: ResultRow) -> str:
    return str([row["upstream"].get(key) for key in ("name", "argument", "sha256")])


def _names(rows: Sequence[ResultRow]) -> dict[str, str]:
    """Name of each upstream: as typed, or the last part of a folder. Equal names get the sha256."""
    found = {}
    for row in rows:
        upstream = row["upstream"]
        found[_identity(row)] = Path(upstream["name"]).name if upstream["kind"] == "model" else upstream["name"]
    digests = {
        _identity(row): str(row["upstream"].get("sha256") or row["upstream"].get("argument"))[:6] for row in rows
    }
    return {
        key: f"{name} [{digests[key]}]" if list(found.values()).count(name) > 1 else name for key, name in found.items()
    }
