"""Adapters of token shards for WebDataset, Hugging Face datasets and torch.

    import webdataset
    dataset = webdataset.WebDataset("DIR/shards/{00000..00099}.tar", shardshuffle=100).compose(utterances)
    for sample in dataset.shuffle(1000):
        sample["__key__"], sample["codes"], sample["json"]

    dataset = as_hf_dataset("DIR", streaming=True).with_format("numpy")

`datasets.load_dataset("webdataset", data_files=...)` also opens packed shards. It yields blocks, which `utterances`
splits. It refuses entropy-coded shards, whose tars begin with another kind of member.

`Shards` is a map-style torch Dataset: it has a length, pickles to worker processes, and reads only the requested codes.

    shards = Shards("DIR")
    loader = DataLoader(range(len(shards)), 8, shuffle=True, collate_fn=lambda i: [shards.codes(j) for j in i])
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from codecssl.tokenize.codec import CodecCard
from codecssl.tokenize.common.errors import UserError
from codecssl.tokenize.format.blocks import block_codes, mel_planes
from codecssl.tokenize.format.entropy import Coder
from codecssl.tokenize.format.layout import read_coder, read_columns, read_header, scales_of, shard_path
from codecssl.tokenize.format.validate import gunzip, read_npz
from codecssl.tokenize.shards import Shards, Utterance

if TYPE_CHECKING:
    import datasets

# ---------------------------------------------------------------- WebDataset


def utterances(blocks: Iterable[dict[str, Any]], card: CodecCard | None = None) -> Iterator[dict[str, Any]]:
    """WebDataset stage that splits the blocks of the tars into utterances. Put it before a shuffle.

    A sample has __key__ (the id), __url__, codes (uint16 [R, T]) and json (the labels). Datasets with scales or a
    log-mel plane add scales and mel (uint8 [T, bands]). `card` is required if the tars are not next to their
    dataset.json, for example on a server or in a pipe.
    """
    cards: dict[str, CodecCard] = {}
    tables: tuple[str, Coder] | None = None
    for block in blocks:
        url = str(block.get("__url__", ""))
        card_here = card or cards.get(url) or cards.setdefault(url, _card_next_to(url))
        if "tables.npz" in block:
            tables = url, Coder.from_bytes(_npz_bytes(block["tables.npz"]), card_here.codes_per_frame)
        if "codes" not in block:
            continue
        text, numbers = _text(block["json.gz"]), _numbers(block["npz"])
        if "stream_words" in numbers and (tables is None or tables[0] != url):
            tables = url, read_coder(Path(url), card_here)  # the blocks were shuffled
        coder = tables[1] if tables and "stream_words" in numbers else None
        planes = mel_planes(block["mel"], numbers, card_here) if "mel" in block else []
        for within, codes in enumerate(block_codes(block["codes"], numbers, card_here, coder)):
            sample = {"__key__": text["id"][within], "__url__": url, "codes": codes, "json": _labels(text, within)}
            if (scales := scales_of(numbers, within, card_here)) is not None:
                sample["scales"] = scales
            if "mel" in block:
                sample["mel"] = planes[within]
            yield sample


def _card_next_to(url: str) -> CodecCard:
    try:
        return CodecCard.from_dict(read_header(Path(url.removeprefix("file:")).parent.parent)["codec"])
    except UserError as error:
        raise UserError(
            f"{url or 'a block'}: no codec card next to it ({error}); give card=Shards(...).card"
        ) from error


def _text(value: Any) -> dict[str, Any]:
    """Parse KEY.json.gz as given by WebDataset, with or without decode(), or by the loader of `datasets`."""
    if isinstance(value, bytes):
        return dict(json.loads(gunzip(value)))
    return dict(value)


def _numbers(value: Any) -> Mapping[str, NDArray[Any]]:
    columns = read_npz(value) if isinstance(value, bytes) else value
    return {name: np.asarray(columns[name]) for name in columns}


def _npz_bytes(value: Any) -> bytes:
    if isinstance(value, bytes):
        return value
    buffer = io.BytesIO()
    np.savez(buffer, **value)
    return buffer.getvalue()


def _labels(text: dict[str, Any], within: int) -> dict[str, Any]:
    return {name: column[within] for name, column in text["labels"].items() if column[within] is not None}


# ---------------------------------------------------------------- Hugging Face datasets


def as_hf_dataset(
    path: str | Path, streaming: bool = False, num_proc: int | None = None
) -> datasets.Dataset | datasets.IterableDataset:
    """Open shards as a dataset with the columns id, path, codes ([R, T]), samples, source_sha256, scales and labels.

    The column scales exists only if the codec has scales. With `streaming`, blocks are read during iteration.
    Otherwise `num_proc` processes copy the dataset to Arrow files in the cache. The blocks are the dataset's shards,
    which workers and nodes divide. Labels are JSON text if they mix types or are not numbers, texts or lists of
    these. A label named like another column gets the prefix `label_`.
    """
    import datasets

    shards = Shards(path)
    kinds = _label_kinds(shards)
    features = _features(shards.card, kinds)
    rows = {
        "path": str(Path(path).absolute()),
        "blocks": list(range(len(shards.blocks))),
        "as_json": {name: kind is None for name, kind in kinds.items()},
        "fingerprint": shards.fingerprint,
    }
    if streaming:
        return datasets.IterableDataset.from_generator(_rows, features=features, gen_kwargs=rows)
    return datasets.Dataset.from_generator(_rows, features=features, gen_kwargs=rows, num_proc=num_proc)


def _rows(path: str, blocks: list[int], as_json: dict[str, bool], fingerprint: str) -> Iterator[dict[str, Any]]:
    """Yield the rows of `blocks`. `fingerprint` separates different codes at one path in the cache of `datasets`."""
    shards = Shards(path)
    for block in blocks:
        first, count = (int(shards.blocks[name][block]) for name in ("first", "count"))
        for index in range(first, first + count):
            utterance = shards.utterance(index)
            yield _row(utterance, as_json) | {"codes": shards.codes(index)}


def _row(utterance: Utterance, as_json: dict[str, bool]) -> dict[str, Any]:
    row: dict[str, Any] = {name: getattr(utterance, name) for name in ("id", "path", "samples", "source_sha256")}
    if utterance.scales is not None:
        row["scales"] = utterance.scales
    for name, text in as_json.items():
        value = utterance.labels.get(name)
        row[_column(name)] = json.dumps(value, ensure_ascii=False) if text and value is not None else value
    return row


def _features(card: CodecCard, kinds: dict[str, Any]) -> datasets.Features:
    from datasets import Features, Sequence, Value
    from datasets.features.features import generate_from_arrow_type

    columns: dict[str, Any] = {name: Value(kind) for name, kind in OWN.items() if kind}
    columns["codes"] = Sequence(Sequence(Value("uint16")))
    if card.segment_samples:
        columns["scales"] = Sequence(Value("float32"))
    labels = {_column(n): Value("string") if k is None else generate_from_arrow_type(k) for n, k in kinds.items()}
    return Features(columns | labels)


OWN = {"id": "string", "path": "string", "samples": "int64", "source_sha256": "string", "codes": "", "scales": ""}
"""The project's own columns, with the Arrow types of the plain ones."""


def _column(label: str) -> str:
    return f"label_{label}" if label in OWN else label


def _label_kinds(shards: Shards) -> dict[str, Any]:
    """Return the Arrow type of each label over all blocks, None for JSON text. Reads the text of all blocks."""
    import pyarrow as pa

    kinds: dict[str, Any] = {}
    for row in shards.blocks:
        with shard_path(shards.path, int(row["shard"])).open("rb") as file:
            text, _ = read_columns(file, int(row["offset"]))
        for name, column in text["labels"].items():
            kinds[name] = _common(kinds.get(name, pa.null()), _kind(column))
    return {name: _plain(kind) for name, kind in sorted(kinds.items())}


def _kind(column: list[Any]) -> Any:
    import pyarrow as pa

    try:
        return pa.array(column).type
    except (pa.ArrowException, OverflowError):
        return None


def _common(a: Any, b: Any) -> Any:
    import pyarrow as pa

    if a is None or b is None:
        return None
    try:
        schemas = [pa.schema([("x", kind)]) for kind in (a, b)]
        return pa.unify_schemas(schemas, promote_options="permissive").field("x").type
    except pa.ArrowException:
        return None


def _plain(kind: Any) -> Any:
    import pyarrow as pa

    inner = kind.value_type if kind is not None and pa.types.is_list(kind) else kind
    if inner is None or pa.types.is_nested(inner) or pa.types.is_null(inner):
        return None
    return kind
