"""The command line `codecssl-tokenize`. Its actions are in `commands`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from codecssl.tokenize import commands
from codecssl.tokenize.common.command_line import CommandLine, Renamed, add_sharing, amount, positive, whole
from codecssl.tokenize.common.process import guarded

SOURCES = (
    "folder, glob, audio file, .tsv/.csv/.jsonl manifest (path, [id, start, end in seconds, labels]), "
    "hf:NAME[:CONFIG]:SPLIT (Hugging Face datasets), wds:PATTERN (audio tars), or - (a list of paths on stdin)"
)
CODEC = "a codec of `codecssl-tokenize codecs`, the path or URL of its weights, or NAME@PATH"
CODEBOOKS = "keep the first K codebooks (default: the codec's own number)"
WEIGHTS = "path of the codec's weights, if they have moved"


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code (see `common.command_line`)."""
    return command_line().main(argv)


def command_line() -> CommandLine:
    """Build the subcommands and their arguments without heavy imports."""
    line = CommandLine("codecssl-tokenize", "Encode audio once into token shards, check them, decode them.")
    _add_run(line)
    _add_dataset_commands(line)
    _add_codec_commands(line)
    return line


def _add_run(line: CommandLine) -> None:
    run = line.command(
        "run",
        commands.run,
        group="token shards",
        help="encode audio into token shards; run it again to resume",
        example="run recordings --output shards --codec tiny_16khz",
        resume="resumes after the last whole block",
    )
    run.add_argument("sources", nargs="+", metavar="SOURCE", help=SOURCES)
    _add_output(run, "DIR", "the dataset's folder")
    codec = run.add_argument_group("codec")
    codec.add_argument("--codec", default="tiny_16khz", metavar="NAME|PATH", help=CODEC)
    codec.add_argument(
        "--num-codebooks", type=positive, metavar="K", help="keep the first K codebooks (default: the codec's own)"
    )
    codec.add_argument(
        "--device",
        default="cpu",
        metavar="cpu|cuda",
        help="device of the codec; cuda: all visible GPUs; cuda:1: the second",
    )
    codec.add_argument(
        "--workers",
        type=whole,
        metavar="N",
        help="processes that read and encode, worker i on GPU i (default: one per core, or two per GPU if there are"
        " several; 0: none)",
    )
    shards = run.add_argument_group("shards")
    shards.add_argument("--entropy-code", action="store_true", help="entropy-code the codes, without loss")
    shards.add_argument("--compress", action=Renamed, const="--entropy-code", dest="entropy_code")
    shards.add_argument(
        "--with-mel",
        type=positive,
        metavar="BANDS",
        help="store an 8-bit log-mel plane of this many bands (80) too, for model.input mel or both",
    )
    shards.add_argument(
        "--mel-scale",
        choices=("htk", "slaney"),
        help="mel scale of the bands (default: htk, which the shipped models read, or that of the existing folder)",
    )
    shards.add_argument("--shard-inputs", type=positive, default=8192, metavar="N", help="inputs per shard")
    shards.add_argument(
        "--block-inputs",
        type=positive,
        default=2048,
        metavar="N",
        help="inputs per block; a killed run loses one block at most",
    )
    add_sharing(run)
    failures = run.add_argument_group("failures")
    failures.add_argument(
        "--retry-failed", action="store_true", help="read the inputs of failed.jsonl again, if their cause is gone"
    )
    failures.add_argument("--strict", action="store_true", help="exit 1 when an input could not be read")
    failures.add_argument(
        "--stall-minutes",
        type=amount,
        default=0.0,
        metavar="M",
        help="exit with 76 when no input was finished for M minutes (0: never)",
    )


def _add_dataset_commands(line: CommandLine) -> None:
    group = "token shards"
    verify = line.command(
        "verify",
        commands.verify,
        group=group,
        help="check every byte and every count of a dataset, and encode a few utterances again",
        example="verify shards --sample 8",
    )
    _add_dataset(verify)
    verify.add_argument("--sample", type=whole, default=4, metavar="N", help="utterances to encode again and compare")
    verify.add_argument("--weights", "--codec-weights", metavar="PATH", help=WEIGHTS)
    repair = line.command(
        "repair",
        commands.repair,
        group=group,
        help="encode the damaged shards of a dataset again; the others stay as they are",
        example="repair shards",
        resume="resumes the repair",
    )
    _add_dataset(repair)
    repair.add_argument(
        "--workers", type=whole, metavar="N", help="processes that read and encode (default: one per core)"
    )
    repair.add_argument("--weights", "--codec-weights", metavar="PATH", help=WEIGHTS)
    status = line.command(
        "status", commands.status, group=group, help="progress of a run, from its files alone", example="status shards"
    )
    _add_dataset(status)
    status.add_argument("--tasks", type=positive, metavar="N", help="the run's --tasks: name the unfinished ones")
    stats = line.command(
        "stats",
        commands.stats,
        group=group,
        help="hours, bits, and the use and entropy of each codebook",
        example="stats shards --plot codes.png",
    )
    _add_dataset(stats)
    stats.add_argument("--plot", type=Path, metavar="PNG", help="draw the histograms of the codes")
    decode = line.command(
        "decode",
        commands.decode,
        group=group,
        help="turn the codes of one utterance back into audio",
        example="decode shards --id speech/a.wav --output a.wav",
    )
    decode.add_argument("dataset", type=Path, metavar="DIR")
    decode.add_argument("--id", required=True, help="the utterance's id")
    _add_output(decode, "WAV", "audio file to write")
    decode.add_argument("--num-codebooks", type=positive, metavar="K", help="use the first K codebooks only")
    decode.add_argument("--weights", "--codec-weights", metavar="PATH", help=WEIGHTS)


def _add_codec_commands(line: CommandLine) -> None:
    group = "codecs"
    codecs = line.command(
        "codecs",
        commands.codecs,
        group=group,
        help="list the codecs, or load one, print its card and remember the path of its weights",
        example="codecs encodec_24khz@weights/encodec_24khz.th",
    )
    codecs.add_argument("codec", nargs="?", metavar="NAME@PATH", help=CODEC)
    check = line.command(
        "check-codec",
        commands.check_codec,
        group=group,
        help="count the codes that change with the batch, the cut and the implementation on this device",
        example="check-codec mimi recordings --device cuda",
    )
    check.add_argument("codec", metavar="NAME|PATH", help=CODEC)
    check.add_argument("sources", nargs="*", metavar="SOURCE", help="audio to check with (default: noise and tones)")
    _add_measured(check)
    check.add_argument("--json", action="store_true", help="print JSON")
    bench = line.command(
        "bench",
        commands.bench,
        group=group,
        help="time codecssl next to the reference model, which encodes file by file",
        example="bench recordings --codec encodec_24khz",
    )
    bench.add_argument("sources", nargs="+", metavar="SOURCE", help="audio to encode")
    bench.add_argument("--codec", default="tiny_16khz", metavar="NAME|PATH", help=CODEC)
    _add_measured(bench)
    bench.add_argument("--rounds", type=positive, default=3, help="runs of each, in turns; the fastest counts")
    bench.add_argument("--json", action="store_true", help="print JSON, one line a measurement")
    _add_compare(line)
    train = line.command(
        "train-codec",
        commands.train_codec,
        group=group,
        help="train tiny_16khz on a manifest of audio",
        example="train-codec manifest.jsonl --output codec",
        resume="resumes from the last checkpoint",
    )
    train.add_argument("manifest", type=Path, metavar="JSONL", help="rows with path, task and, where known, speaker")
    _add_output(train, "DIR", "checkpoints, log and weights")
    train.add_argument("--steps", type=positive, help="training steps (default: those of the shipped codec)")
    evaluate = line.command(
        "eval-codec",
        commands.eval_codec,
        group=group,
        help="mel distance, SI-SDR and code usage on held-out clips",
        example="eval-codec manifest.jsonl --codec tiny_16khz --codec tiny_16khz:4",
    )
    evaluate.add_argument("manifest", type=Path, metavar="JSONL", help="rows as for train-codec")
    evaluate.add_argument(
        "--codec",
        action="append",
        required=True,
        metavar="NAME|PATH[:K]",
        help="repeat to compare; :K keeps K codebooks",
    )
    evaluate.add_argument("--clips", type=positive, default=120, help="held-out clips, evenly spread over the tasks")
    evaluate.add_argument("--json", action="store_true", help="print JSON")


def _add_compare(line: CommandLine) -> None:
    compare = line.command(
        "compare",
        commands.compare,
        group="codecs",
        help="bits, entropies, fidelity, speed, memory and linear probes of codecs on the same clips",
        example="compare tiny_16khz mimi:4 dac_16khz --data manifest.jsonl --where task=er --output comparison",
    )
    compare.add_argument("codecs", nargs="+", metavar="NAME|PATH[:K]", help="codecs to compare; :K keeps K codebooks")
    compare.add_argument("--data", action="append", required=True, metavar="SOURCE", help=SOURCES)
    compare.add_argument(
        "--label",
        action="append",
        default=[],
        metavar="COLUMN[/GROUP]",
        help="column to predict from the latents; a value of GROUP is never in training and test (repeat; default: "
        "label, emotion, language, speaker, gender, accent where the data has them)",
    )
    compare.add_argument(
        "--where", action="append", default=[], metavar="COLUMN=PATTERN", help="only inputs that match (repeat)"
    )
    compare.add_argument("--clips", type=positive, default=60, help="clips, evenly spread over the data")
    compare.add_argument("--seconds", type=amount, default=10.0, help="length to which clips are cut")
    compare.add_argument("--device", default="cpu", metavar="cpu|cuda", help="where the codecs run")
    compare.add_argument(
        "--output", "-o", type=Path, metavar="DIR", help="write results.json, report.md, report.html and plots"
    )
    compare.add_argument("--json", action="store_true", help="print JSON")


def _add_output(parser: argparse.ArgumentParser, metavar: str, help: str) -> None:
    parser.add_argument("--output", "-o", type=Path, required=True, metavar=metavar, help=help)


def _add_dataset(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("dataset", type=Path, metavar="DIR", help="folder of token shards")
    parser.add_argument("--json", action="store_true", help="print JSON")


def _add_measured(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--num-codebooks", type=positive, metavar="K", help="the first K codebooks (default: the codec's own)"
    )
    parser.add_argument("--device", default="cpu", metavar="cpu|cuda", help="where the codec runs")
    parser.add_argument("--seconds", type=amount, default=120.0, help="audio to use, at most")


if __name__ == "__main__":
    sys.exit(guarded(main))
