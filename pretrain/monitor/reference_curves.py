"""Shipped loss curves, to which runs of the same config on the same data are compared.

They were recorded on the spoken sample corpus, which every user has: for the README's demo and for each objective. A
matching run draws its reference curve into curves.png and prints the difference at its end.
`python -m codecssl.pretrain.monitor.reference_curves RUN --what TEXT` adds a finished run, or replaces the one that
it repeats.
"""

import argparse
import hashlib
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from codecssl.configs.load import differences
from codecssl.pretrain.config import RunConfig
from codecssl.pretrain.frame_rate import IN_SECONDS, at_frame_rate
from codecssl.pretrain.monitor.telemetry import read_rows
from codecssl.pretrain.run_folder import FREE, read_config, read_data
from codecssl.tokenize.codec import CodecCard

STORE = Path(__file__).with_name("expected.jsonl")
_USUAL = at_frame_rate(RunConfig(), 50)
_LEFT_OUT = ("data.labels", "data.valid_labels", *IN_SECONDS)  # the frames are in the key


@dataclass(frozen=True, kw_only=True)
class Curve:
    """Losses of one run by split: [[step, loss in nats], ...]."""

    key: str
    what: str
    losses: dict[str, list[list[float]]]


def curve_key(config: RunConfig, codec: str, frames: int) -> str:
    """Return the key of a curve, from the config, the sha256 of the codec's weights and the frames per epoch.

    config: with lengths in frames (`at_frame_rate`).
    """
    changed = {key: new for key, (_, new) in differences(_USUAL, config).items() if not key.startswith(FREE)}
    parts = [sorted((key, str(new)) for key, new in changed.items() if key not in _LEFT_OUT), codec, frames]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def find(key: str, store: Path = STORE) -> Curve | None:
    """Return the stored curve with this key, or None."""
    return next((curve for curve in _read(store) if curve.key == key), None)


def verdict(curve: Curve, losses: Sequence[tuple[float, float]], split: str = "valid") -> str | None:
    """Return a line that compares a run's last loss with the stored one of that step; None if no step is common."""
    stored = {point[0]: point[1] for point in curve.losses.get(split, [])}
    common = [(step, loss) for step, loss in losses if step in stored]
    if not common:
        return None
    step, loss = common[-1]
    return f"expected at step {step:.0f}: {split} loss {stored[step]:.4f} ({curve.what}); this run {loss:.4f}"


def add(run: Path, what: str, frames: int, store: Path = STORE) -> Curve:
    """Store a run's curve under its key."""
    config, card, losses = read_config(run), CodecCard.from_dict(read_data(run)["codec"]), {}
    for split in ("train", "valid"):
        rows = [row for row in read_rows(run / "metrics.jsonl") if row["split"] == split]
        losses[split] = [[row["step"], round(row["loss"], 4)] for row in rows]
    key = curve_key(at_frame_rate(config, card.frame_rate), card.weights_sha256, frames)
    curve = Curve(key=key, what=what, losses=losses)
    kept = [other for other in _read(store) if other.key != curve.key]
    lines = sorted(json.dumps(asdict(each)) for each in (*kept, curve))
    store.write_text("".join(line + "\n" for line in lines))
    return curve


def _read(store: Path) -> list[Curve]:
    return [Curve(**json.loads(line)) for line in store.read_text().splitlines()] if store.exists() else []


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m codecssl.pretrain.monitor.reference_curves", description=__doc__)
    parser.add_argument("run", type=Path, metavar="RUN")
    parser.add_argument("--what", required=True, metavar="TEXT", help="what it is: config, data and changes")
    arguments = parser.parse_args()
    from codecssl.pretrain.data.open_data import open_data
    from codecssl.pretrain.ranks import Ranks

    train, _, _ = open_data(read_config(arguments.run), Ranks(rank=0, world_size=1, local_rank=0))
    curve = add(arguments.run, arguments.what, train.plan.frames_per_epoch)
    print(f"{STORE}: {curve.key} {curve.what}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
