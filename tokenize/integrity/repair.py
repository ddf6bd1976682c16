"""`codecssl-tokenize repair`: damaged shards are encoded again from their sources; intact ones stay unchanged.

Damaged files are kept in DIR/damaged until the new shard is complete. dataset.json is moved there first, so that no
reader opens a dataset under repair. An interrupted repair resumes when it is run again.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from codecssl.tokenize.codec import CodecCard
from codecssl.tokenize.common.errors import UserError
from codecssl.tokenize.common.files import sync_folder, write_atomic
from codecssl.tokenize.format.layout import load_json, sealed, shard_path
from codecssl.tokenize.format.validate import check_plan
from codecssl.tokenize.format.writer import finish_dataset, to_json
from codecssl.tokenize.integrity.shard_check import check_shard, read_document
from codecssl.tokenize.integrity.verify import STDIN, OnShards, examine, read_statements, version_of
from codecssl.tokenize.registry import load_codec_for, named_source
from codecssl.tokenize.sources.changes import source_hashes
from codecssl.tokenize.sources.inputs import Input
from codecssl.tokenize.sources.sources import is_stream, read_sources

if TYPE_CHECKING:
    from codecssl.tokenize.config import TokenizeConfig
    from codecssl.tokenize.progress import Progress


def repair(
    root: Path,
    on_progress: OnShards = lambda done, total: None,
    *,
    workers: int | None = None,
    weights: str | None = None,
    progress: Callable[[Progress], None] = lambda _: None,
) -> list[str]:
    """Repair a dataset. Return one line per action; [] if it was intact.

    on_progress: called with the number of checked shards. progress: called while encoding. workers: as in
    TokenizeConfig. weights: of the codec, if they have moved. Raises UserError, and changes nothing, if the sources or
    the codec are missing or differ from those that wrote the dataset.
    """
    quarantine = Quarantine(root)
    state = find_damage(root, on_progress)
    if state.finished and not (state.damaged or state.files or quarantine.begun):
        return []
    card = state.card
    if state.damaged or not state.finished:
        config = _config(root, state, workers, weights)
        card = _check_codec(root, state, config, weights)
        _check_sources(root, quarantine, state)
        quarantine.take(state)
        from codecssl.tokenize.run import run

        run(config, progress, compare=False)  # intact shards need no source
    elif state.files:
        if "plan.json" in state.files:
            write_atomic(root / "plan.json", to_json(sealed(state.plan)))
        finish_dataset(root, state.plan, read_statements(root).shards)
    if left := examine(root, on_progress=on_progress).damages:
        raise UserError(f"{root}: still damaged: {left[0]}; what was damaged before is in {quarantine.folder}")
    return [f"{name}: written again" for name in state.files] + list(quarantine.settle(state, card))


# ---------------------------------------------------------------- what is to be done


@dataclass(frozen=True, kw_only=True)
class State:
    """Required repair steps."""

    plan: dict[str, Any]
    damaged: list[int]
    """Shards that exist and are damaged."""
    unsure: list[int]
    """The damaged shards whose completion record is damaged: its content is unreliable."""
    files: list[str]
    """Files other than shards, to be written again."""
    finished: bool
    """True if dataset.json exists. Otherwise some shards may not have been started."""

    @property
    def card(self) -> CodecCard:
        return CodecCard.from_dict(self.plan["codec"])


def find_damage(root: Path, on_progress: OnShards) -> State:
    """Check a dataset, even one with an unfinished run or repair. Raises UserError if it cannot be identified."""
    if not (root / "dataset.json").exists():
        return _unfinished(root, on_progress)
    found, statements = examine(root, on_progress=on_progress).damages, read_statements(root)
    if statements.plan is None:
        raise UserError(f"{root}: dataset.json is damaged and there is no plan.json: the codec is unknown")
    if lost := [damage for damage in found if damage.file == STDIN]:
        raise UserError(f"{root}: {lost[0]}; it cannot be restored; put it back")
    if not statements.agree:
        raise UserError(f"{root}: {found[0]}; put back the right one by hand, nothing was changed")
    return State(
        plan=statements.plan,
        damaged=sorted({damage.shard for damage in found if damage.shard is not None}),
        unsure=[d.shard for d in found if d.shard is not None and d.file.endswith(".json")],
        files=sorted({damage.file for damage in found if damage.shard is None}),
        finished=True,
    )


def _unfinished(root: Path, on_progress: OnShards) -> State:
    try:
        plan = read_document(root / "plan.json")
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{root}: no dataset.json and no plan.json; this is not a folder of token shards") from None
    check_plan(plan, root / "plan.json")
    card, version = CodecCard.from_dict(plan["codec"]), version_of(plan)
    shards = sorted(int(path.stem) for path in (root / "shards").glob("[0-9]*.json"))
    damaged: list[int] = []
    unsure: list[int] = []
    for done, shard in enumerate(shards, 1):
        found = check_shard(root, shard, card, version).damages
        damaged += [shard] if found else []
        unsure += [shard] if any(damage.file.endswith(".json") for damage in found) else []
        on_progress(done, len(shards))
    return State(plan=plan, damaged=damaged, unsure=unsure, files=[], finished=False)


def _config(root: Path, state: State, workers: int | None, weights: str | None) -> TokenizeConfig:
    """Configuration of the run that wrote the dataset, as one task."""
    from codecssl.tokenize.config import TokenizeConfig

    card, plan = state.card, state.plan
    if not plan.get("sources"):
        damaged = ", ".join(f"{shard:05d}" for shard in state.damaged[:5])
        raise UserError(f"{root}: shards {damaged} were not made from audio; write the dataset again")
    return TokenizeConfig(
        sources=tuple(plan["sources"]),
        output=root,
        codec=named_source(card, weights),
        num_codebooks=card.num_codebooks,
        device=card.policies.get("device", "cpu"),
        workers=workers,
        entropy_code=bool(plan.get("compression")),
        mel_bands=plan["mel"]["bands"] if "mel" in plan else None,
        **{size: plan[size] for size in ("shard_inputs", "block_inputs", "block_seconds") if size in plan},
    )


def _check_codec(root: Path, state: State, config: TokenizeConfig, weights: str | None) -> CodecCard:
    """Return the card of the local codec."""
    import torch

    if config.device != "cpu" and not torch.cuda.is_available():
        raise UserError(f"{root}: its shards were encoded on {config.device}; repair it on such a machine")
    card = load_codec_for(state.card, device=config.device, weights=weights).card
    if card.fingerprint != state.card.fingerprint:
        raise UserError(f"{root}: the codec here is another one ({state.card.difference(card)}); nothing was changed")
    return card


def _check_sources(root: Path, quarantine: Quarantine, state: State) -> None:
    """Check that all inputs of intact and damaged shards still exist. Lists the sources once."""
    sources, size = list(state.plan["sources"]), state.plan["shard_inputs"]
    if any(is_stream(source) for source in sources):
        return  # listing them would fetch them
    missing: list[str] = []
    again = {*state.damaged, *quarantine.begun}
    try:
        for shard, group in groupby(enumerate(read_sources(sources)), key=lambda pair: pair[0] // size):
            inputs = (item for _, item in group)
            record = None if shard in state.unsure else quarantine.record(shard)
            missing += _missing(root, shard, inputs, record, encode=shard in again)
    except UserError as error:
        where = "" if all(Path(s).is_absolute() for s in sources) else ", seen from the folder where the run was begun"
        raise UserError(f"{error}; a repair needs the sources{where}; nothing was changed") from error
    if missing:
        raise UserError(
            f"{root}: {len(missing)} files that the damaged shards were made of are not there, the first is "
            f"{missing[0]}; put them back; nothing was changed"
        )


def _missing(
    root: Path, shard: int, inputs: Iterator[Input], record: dict[str, Any] | None, encode: bool
) -> Iterator[str]:
    """Yield missing files of a shard to encode, except those that could not be read originally."""
    failed = {row["id"] for row in record["failed"]} if record else set()
    digest = hashlib.sha256()
    for item in inputs:
        digest.update(item.digest())
        elsewhere = item.row is not None or item.data is not None or item.problem is not None or "://" in item.file
        if encode and not elsewhere and item.id not in failed and not Path(item.file).is_file():
            yield item.file
    if record and record["inputs_sha256"] != digest.hexdigest():
        raise UserError(f"{root}: the sources are not those that shard {shard:05d} was made of")


# ---------------------------------------------------------------- what was damaged


class Quarantine:
    """The folder DIR/damaged. Its shards.json lists the shards of an unfinished repair."""

    def __init__(self, root: Path) -> None:
        self.root, self.folder = root, root / "damaged"
        self.list = self.folder / "shards.json"
        self.begun: list[int] = _begun(self.list)

    def tar(self, shard: int) -> Path:
        return self.folder / shard_path(self.root, shard).name

    def record(self, shard: int) -> dict[str, Any] | None:
        """Return the previous completion record of a shard; None if it is lost."""
        for path in (self.tar(shard), shard_path(self.root, shard)):
            record = _read(path.with_suffix(".json"))
            if record and record.get("shard") == shard and {"failed", "inputs_sha256"} <= record.keys():
                return record
        return None

    def take(self, state: State) -> None:
        """Move damaged files here, in an order in which no interruption loses anything."""
        self.folder.mkdir(exist_ok=True)
        if "plan.json" in state.files:
            write_atomic(self.root / "plan.json", to_json(sealed(state.plan)))
        self.begun = sorted({*state.damaged, *self.begun})
        write_atomic(self.list, to_json({"shards": self.begun}))
        _move(self.root / "dataset.json", self.folder / "dataset.json")
        for shard in self.begun:
            tar, kept = shard_path(self.root, shard), self.tar(shard)
            if shard in state.damaged:
                shutil.rmtree(self.root / "work" / f"{shard:05d}", ignore_errors=True)
                _move(tar.with_suffix(".json"), kept.with_suffix(".json"))
            if shard in state.damaged or not (kept.exists() or tar.with_suffix(".json").exists()):
                _move(tar, kept)
        if (self.root / "shards").is_dir():
            sync_folder(self.root / "shards")

    def settle(self, state: State, here: CodecCard) -> Iterator[str]:
        """Yield a line per new shard. Remove the damaged files, unless the new shard differs from the original."""
        before, now = (_read(folder / "dataset.json") or {} for folder in (self.folder, self.root))
        for shard in self.begun:
            kept, name = self.tar(shard), f"shard {shard:05d}: encoded again"
            old, new = (_read(tar.with_suffix(".json")) or {} for tar in (kept, shard_path(self.root, shard)))
            if before.get("sha256") == now["sha256"] or old.get("sha256") == new["sha256"]:
                yield f"{name}, byte for byte as it was"
                for suffix in (".json", ".tar"):
                    kept.with_suffix(suffix).unlink(missing_ok=True)
            else:
                why = self._why(shard, state.card, here)
                yield f"{name}, but it is not what it was: {why}; the damaged one is kept as {kept}"
        if not state.finished and not self.begun:
            yield "the run was not finished: completed"
        for name in ("dataset.json", "shards.json"):
            (self.folder / name).unlink(missing_ok=True)
        if self.folder.is_dir() and not any(self.folder.iterdir()):
            self.folder.rmdir()

    def _why(self, shard: int, card: CodecCard, here: CodecCard) -> str:
        old, new = (_sources_of(tar) for tar in (self.tar(shard), shard_path(self.root, shard)))
        changed = sorted(id for id in old.keys() & new.keys() if old[id] != new[id])
        gone = sorted(old.keys() - new.keys())
        if changed or gone:
            first = (changed + gone)[0]
            return f"{len(changed)} sources changed since, {len(gone)} can no longer be read, the first is {first}"
        versions = {name: (version, here.versions.get(name)) for name, version in card.versions.items()}
        if others := [f"{name} {a}, now {b}" for name, (a, b) in versions.items() if a != b]:
            return f"it was made with {others[0]}"
        return "this machine rounds otherwise, or nothing is left to compare it with"


def _begun(path: Path) -> list[int]:
    shards = load_json(path).get("shards") if path.exists() else []
    if not isinstance(shards, list) or not all(type(shard) is int and 0 <= shard < 1 << 31 for shard in shards):
        raise UserError(f"{path}: damaged, no list of shards; remove it")
    return shards


def _move(path: Path, target: Path) -> None:
    if target.exists():  # from an earlier repair: that is the original
        path.unlink(missing_ok=True)
    elif path.exists():
        path.replace(target)


def _read(path: Path) -> dict[str, Any] | None:
    try:
        return load_json(path)
    except (OSError, UserError):
        return None


def _sources_of(tar: Path) -> dict[str, bytes]:
    """Return the sources' sha256 by id, from the readable blocks."""
    return source_hashes((tar, place["offset"]) for place in (_read(tar.with_suffix(".json")) or {}).get("blocks", []))
