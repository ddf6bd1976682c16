"""`codecssl-superb embed-bench`: speed of `embed`, and the share of its time that the model alone takes.

The whole is everything after loading: reading, decoding and resampling of audio or reading of tokens, the codec, the
model, pooling, and Parquet. The model's time is that of its forward passes in the same run, on the same tokens. On a
CPU the shares are of processor time, which other programs on the machine disturb less than wall-clock time.
"""

import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from codecssl.superb.embed.embed import AudioInputs, EmbedConfig, open_inputs, write_shards
from codecssl.superb.embed.stopwatch import Stopwatch
from codecssl.tokenize.common.errors import UserError


def bench(config: EmbedConfig) -> dict[str, Any]:
    """Embed all inputs into a temporary folder; `config.output` is not used.

    Returns "inputs", "failed", "seconds", "cpu_seconds", "files_per_second" (wall-clock), and the shares "model_share",
    "codec_share" (0 for token shards) and "other_share". Raises UserError if no input could be embedded.
    """
    source, count = open_inputs(config)
    whole, model, codec = Stopwatch(), Stopwatch(), Stopwatch()

    def timed(watch: Stopwatch, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            with watch:
                result = function(*arguments, **options)
                if config.device != "cpu":
                    torch.cuda.synchronize()
                return result

        return call

    if isinstance(source, AudioInputs):
        expert = source.states.expert
        expert.forward = timed(model, expert.forward)
        if hasattr(expert, "codes"):
            expert.codes = timed(codec, expert.codes)
    else:
        source.reader.encoder.extract = timed(model, source.reader.encoder.extract)
    with tempfile.TemporaryDirectory() as folder:
        source.config = replace(config, output=Path(folder), tasks=1, task=0)
        with whole:
            totals = write_shards(source, count)
    if not totals or not totals["embeddings"]:
        raise UserError(f"{', '.join(config.sources)}: no input could be embedded")
    total, alone, codes = (w.cpu_seconds if config.device == "cpu" else w.seconds for w in (whole, model, codec))
    return {
        "inputs": totals["embeddings"] + totals["failed"],
        "failed": totals["failed"],
        "seconds": round(whole.seconds, 3),
        "cpu_seconds": round(whole.cpu_seconds, 3),
        "files_per_second": round(totals["embeddings"] / whole.seconds, 2),
        "model_share": round((alone - codes) / total, 4),
        "codec_share": round(codes / total, 4),
        "other_share": round(1 - alone / total, 4),
    }
