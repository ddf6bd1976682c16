"""Arguments that several subcommands of codecssl-superb share."""

import argparse
from pathlib import Path
from typing import Any

from codecssl.tokenize.common.command_line import add_codec_weights, positive

UPSTREAMS = (
    "an exported model's folder, fbank, logmel, mfcc, codes (the codec's latents), random (an untrained encoder), "
    "codes:MODEL, codes:CODEC, random:MODEL, NAME@s3prl, or hf:PATH|NAME (transformers); bare codes and random follow "
    "the first model named; repeat to compare"
)
DEVICE = "cpu, cuda or cuda:N"
SIDE = "folder with the small lists that official corpora need"


def add_upstreams(parser: argparse.ArgumentParser) -> None:
    """--upstream, --output, --device, --codec-weights and --jobs."""
    parser.add_argument("--upstream", action="append", required=True, metavar="MODEL|NAME", help=UPSTREAMS)
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="results; may hold earlier ones")
    parser.add_argument("--device", default="cpu", help=DEVICE)
    add_codec_weights(parser)
    parser.add_argument("--jobs", type=positive, default=1, help="runs or probes at a time")


def data_root(data: str, output: Path) -> Path:
    """Return the corpus folder that --data names. The word `sample` unpacks the sample corpus into `output`."""
    from codecssl.superb.sample.unpack import unpack

    return unpack(output / "sample") if data == "sample" else Path(data)


def open_data(data: str, output: Path, side: Path | None = None) -> Any:
    """Open the corpus that --data names."""
    from codecssl.superb.corpora.corpus import open_corpus

    return open_corpus(data_root(data, output), side)
