"""Token shards, format version 1: the layout on disk, and the reader that the trainer uses.

    DIR/dataset.json        format version, codec card, sources, totals; written last
    DIR/index.npy           frames of each utterance (uint16 or uint32), in order
    DIR/blocks.npy          where each block of utterances lies (BLOCK)
    DIR/failed.jsonl        inputs that could not be read
    DIR/shards/00000.tar    a plain tar of blocks; per block three members:
        KEY.json.gz             columns of text: id, path, labels
        KEY.npz                 columns of numbers: sha256, samples, source_rate, source_rest (the source's samples are
                                samples * source_rate // sample_rate + source_rest)
        KEY.codes               per utterance, per codebook, the codes packed at `code_bits`, each plane byte-aligned
    DIR/shards/00000.json   sha256 and counts of the tar: its completion mark

The offset of an utterance inside its block's codes follows from the frames before it: nothing else is stored.
"""

from __future__ import annotations

import gzip
import io
import json
import mmap
import tarfile
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from codecssl.tokenize.bits import packed_size, unpack
from codecssl.tokenize.codec import CodecCard
from codecssl.tokenize.errors import UserError

FORMAT = "codecssl-shards"
FORMAT_VERSION = 1

BLOCK = np.dtype(
    [
        ("shard", "<u4"),
        ("first", "<u8"),  # index of the block's first utterance in the dataset
        ("count", "<u4"),  # utterances
        ("offset", "<u8"),  # of the block's first member in the shard's tar, bytes
        ("codes_offset", "<u8"),  # of its codes
        ("codes_bytes", "<u8"),
        ("crc32", "<u4"),  # of the codes
    ]
)


@dataclass(frozen=True, kw_only=True)
class Utterance:
    """What a dataset knows of one utterance beside its codes."""

    index: int
    id: str
    path: str
    """Relative to its source."""
    source_sha256: str
    samples: int
    """At the codec's sample rate, before padding to whole frames."""
    frames: int
    source_rate: int
    """Hz, of the audio file."""
    source_samples: int
    """Per channel, at `source_rate`."""
    labels: dict[str, Any]


def utterance_bytes(frames: NDArray[np.integer], card: CodecCard) -> NDArray[np.int64]:
    """Bytes of the packed codes of utterances of so many frames."""
    wide = np.asarray(frames, dtype=np.int64)
    total = np.zeros_like(wide)
    for bits, rate in zip(card.code_bits, card.codes_per_frame):
        total += (wide * rate * bits + 7) // 8
    return total


def load_json(path: Path) -> dict[str, Any]:
    """Read a JSON object that we wrote. Raises UserError when it is not one."""
    try:
        value = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: damaged, not JSON ({error})") from error
    if not isinstance(value, dict):
        raise UserError(f"{path}: damaged, not a JSON object")
    return value


def read_header(path: Path) -> dict[str, Any]:
    """dataset.json of a finished dataset. Raises UserError for another folder, an unfinished or a newer one."""
    file = path / "dataset.json"
    if not file.exists():
        if (path / "plan.json").exists():
            raise UserError(f"{path}: not finished; run the same `codecssl-tokenize run` again to complete it")
        raise UserError(f"{path}: no dataset.json; this is not a folder of token shards")
    header = load_json(file)
    if header.get("format") != FORMAT:
        raise UserError(f"{file}: format {header.get('format')!r}, expected {FORMAT!r}")
    if header["format_version"] > FORMAT_VERSION:
        raise UserError(
            f"{file}: format version {header['format_version']}, this codecssl reads up to {FORMAT_VERSION}"
        )
    return header


class Shards:
    """A finished dataset of token shards: `len`, `frames`, `codes(i)`, `utterance(i)`.

    Opening costs a few small files whatever the corpus; codes are read through mmap. Safe to pickle and to fork.
    Raises UserError when the folder holds no finished dataset.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.header = read_header(self.path)
        self.card = CodecCard.from_dict(self.header["codec"])
        self.frames: NDArray[np.integer] = np.load(self.path / "index.npy", mmap_mode="r")
        self.blocks = np.load(self.path / "blocks.npy")
        if len(self.frames) != self.header["totals"]["utterances"]:
            raise UserError(
                f"{self.path}: index.npy has {len(self.frames)} utterances, dataset.json says otherwise; verify it"
            )
        self._firsts: list[int] = self.blocks["first"].tolist()
        self._open_caches()

    def _open_caches(self) -> None:
        # per instance, so that a closed dataset frees its maps
        self._map = lru_cache(maxsize=64)(self._map_shard)
        self._offsets = lru_cache(maxsize=64)(self._block_offsets)
        self._columns = lru_cache(maxsize=4)(self._read_columns)

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["path"])  # type: ignore[misc]

    def __len__(self) -> int:
        return len(self.frames)

    @property
    def fingerprint(self) -> str:
        """Changes when any code does: the sha256 over the shards' own."""
        return str(self.header["sha256"])

    @property
    def num_codebooks(self) -> int:
        return self.card.num_codebooks

    def codes(
        self, index: int, *, num_codebooks: int | None = None, start: int = 0, stop: int | None = None
    ) -> NDArray[np.uint16]:
        """Codes [K, stop - start] of one utterance; only the planes and bytes asked for are read.

        For a codec whose codebooks run at different rates use `planes`. Raises IndexError for what is not there.
        """
        if max(self.card.codes_per_frame) > 1:
            raise UserError(f"{self.path}: codebooks of {self.card.name} run at different rates; read `planes`")
        return np.stack(self.planes(index, num_codebooks=num_codebooks, start=start, stop=stop))

    def planes(
        self, index: int, *, num_codebooks: int | None = None, start: int = 0, stop: int | None = None
    ) -> list[NDArray[np.uint16]]:
        """Per codebook, the codes of frames start..stop: (stop - start) * codes_per_frame[k] of them."""
        frames = int(self.frames[index])
        stop = frames if stop is None else stop
        if not 0 <= start <= stop <= frames:
            raise IndexError(f"frames {start}..{stop}: utterance {index} has {frames}")
        kept = self.num_codebooks if num_codebooks is None else num_codebooks
        if not 1 <= kept <= self.num_codebooks:
            raise IndexError(f"num_codebooks {kept}: the shards hold 1 to {self.num_codebooks}")
        buffer, offset = self._locate(index)
        planes = []
        for bits, rate in zip(self.card.code_bits[:kept], self.card.codes_per_frame):
            size = packed_size(frames * rate, bits)
            planes.append(unpack(buffer[offset : offset + size], bits, start * rate, stop * rate))
            offset += size
        return planes

    def utterance(self, index: int) -> Utterance:
        """Id, source and labels of one utterance."""
        block, within = self._find(index)
        text, numbers = self._columns(block)
        labels = {k: v[within] for k, v in text["labels"].items()}
        samples, source_rate = int(numbers["samples"][within]), int(numbers["source_rate"][within])
        return Utterance(
            index=index,
            id=text["id"][within],
            path=text.get("path", text["id"])[within],
            source_sha256=bytes(numbers["sha256"][within]).hex(),
            samples=samples,
            frames=int(self.frames[index]),
            source_rate=source_rate,
            source_samples=samples * source_rate // self.card.sample_rate + int(numbers["source_rest"][within]),
            labels={k: v for k, v in labels.items() if v is not None},
        )

    def utterances(self) -> Iterator[Utterance]:
        """All utterances, in order."""
        return (self.utterance(i) for i in range(len(self)))

    def find(self, id: str) -> int:
        """The index of an utterance by its id: a scan. Raises UserError when it is not there."""
        for utterance in self.utterances():
            if utterance.id == id:
                return utterance.index
        raise UserError(f"id {id!r}: not in {self.path}; ids look like {self.utterance(0).id!r}")

    # ------------------------------------------------------------ inside

    def _find(self, index: int) -> tuple[int, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"utterance {index}: the dataset has {len(self)}")
        block = bisect_right(self._firsts, index) - 1
        return block, index - self._firsts[block]

    def _locate(self, index: int) -> tuple[NDArray[np.uint8], int]:
        block, within = self._find(index)
        row = self.blocks[block]
        offset = int(row["codes_offset"]) + int(self._offsets(block)[within])
        return self._map(int(row["shard"])), offset

    def _block_offsets(self, block: int) -> NDArray[np.int64]:
        first, count = self._firsts[block], int(self.blocks[block]["count"])
        sizes = utterance_bytes(self.frames[first : first + count], self.card)
        return np.concatenate([[0], np.cumsum(sizes[:-1])])

    def _map_shard(self, shard: int) -> NDArray[np.uint8]:
        path = shard_path(self.path, shard)
        try:
            with path.open("rb") as file:
                return np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)
        except (OSError, ValueError) as error:
            raise UserError(f"{path}: cannot be read ({error}); run `codecssl-tokenize verify {self.path}`") from error

    def _read_columns(self, block: int) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
        row = self.blocks[block]
        with shard_path(self.path, int(row["shard"])).open("rb") as file:
            return read_columns(file, int(row["offset"]))


def shard_path(root: Path, shard: int) -> Path:
    """The tar of a shard."""
    return root / "shards" / f"{shard:05d}.tar"


def read_columns(file: BinaryIO, offset: int) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
    """The text and the number columns of the block whose first member's header is at `offset` of a shard."""
    file.seek(offset)
    with tarfile.open(fileobj=file, mode="r:") as tar:
        text, numbers = (_content(tar) for _ in range(2))
    return json.loads(gzip.decompress(text)), dict(np.load(io.BytesIO(numbers)))


def _content(tar: tarfile.TarFile) -> bytes:
    member = tar.next()
    stream = tar.extractfile(member) if member else None
    if stream is None:
        raise UserError("the tar ends inside a block; verify the dataset")
    return stream.read()
