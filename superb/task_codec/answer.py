"""`codecssl-superb answer`: answer a task from token shards of a task codec, without reading audio."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from codecssl.superb import results
from codecssl.superb.task_codec.codec_folder import load
from codecssl.tokenize.common.errors import UserError
from codecssl.tokenize.common.hashing import file_sha256
from codecssl.tokenize.shards import Shards


def answer(codec: Path, data: Path, output: Path) -> int:
    """Write one JSON line per utterance: id, answer (a list of labels), score of a class. Return the number of lines.

    Raises UserError if another codec wrote the shards, or if the codec has no head.
    """
    quantised, shards = load(codec), Shards(data)
    if shards.card.weights_sha256 != file_sha256(codec / "model.safetensors"):
        raise UserError(f"{data}: was not written with {codec}; tokenize with --codec {codec}")
    lines = []
    for utterance in shards.utterances():
        codes = torch.from_numpy(shards.codes(utterance.index).astype(np.int64))[None]
        logits = quantised.logits(codes, [codes.shape[2]])
        row: dict[str, Any] = {"id": utterance.id, "answer": quantised.answers(codes, [codes.shape[2]])[0]}
        if quantised.head.kind == "class":
            row["score"] = round(float(logits.softmax(dim=-1).max()), 6)
        lines.append(json.dumps(row) + "\n")
    results.write_text(output, "".join(lines))
    return len(lines)
