"""`codecssl-tokenize`: encode audio once, check it, look at it, listen to it."""

from __future__ import annotations

import argparse
import errno
import importlib
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn, TypeVar

from codecssl.tokenize.common.errors import UserError
from codecssl.tokenize.common.process import guarded

FULL = (errno.ENOSPC, errno.EDQUOT)
REFUSED = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP, *FULL)
"""What a file system says of paths that a user chose. Other errors of it are a machine's, with a traceback."""

Number = TypeVar("Number", int, float)
Command = Callable[[str, str], argparse.ArgumentParser]

SOURCES = (
    "folder, glob, audio file, .tsv/.csv/.jsonl manifest (path, [id, start, end in seconds, labels]), "
    "hf:NAME[:CONFIG]:SPLIT (Hugging Face datasets), wds:PATTERN (audio tars), or - (a list of paths on stdin)"
)
CODEC = "a codec of `codecssl-tokenize codecs`, the path or URL of its weights, or NAME@PATH"


def number(kind: Callable[[str], Number], least: Number) -> Callable[[str], Number]:
    """Reads an argument that must be at least `least`."""

    def read(text: str) -> Number:
        if not (value := kind(text)) >= least:
            raise argparse.ArgumentTypeError(f"{text}: must be at least {least}")
        return value

    read.__name__ = getattr(kind, "__name__", "number")  # argparse says it of a text that is none
    return read


positive, whole, amount = number(int, 1), number(int, 0), number(float, 0.0)


class Parser(argparse.ArgumentParser):
    """One whose errors are one line, as all others of ours."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}; see {self.prog} --help\n")


class Help(argparse.ArgumentDefaultsHelpFormatter):
    """Tells the defaults, where there are some."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        none = action.default is None or action.default is False
        return action.help if none else super()._get_help_string(action)


def parser() -> argparse.ArgumentParser:
    """The command's arguments; nothing heavy is imported for them. Command x-y is done by `commands.x_y`."""
    main = Parser(prog="codecssl-tokenize", description=__doc__)
    commands = main.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, help: str) -> argparse.ArgumentParser:
        return commands.add_parser(name, help=help, description=help, formatter_class=Help)

    _add_run(command("run", "encode audio into token shards; run it again to resume"))
    _add_dataset_commands(command)
    _add_codec_commands(command)
    return main


def _add_run(sub: argparse.ArgumentParser) -> None:
    add = sub.add_argument
    add("sources", nargs="+", metavar="SOURCE", help=SOURCES)
    add("--output", "-o", type=Path, required=True, metavar="DIR", help="the dataset's folder")
    add("--codec", default="tiny_16khz", metavar="NAME|PATH", help=CODEC)
    add("--num-codebooks", type=positive, metavar="K", help="keep the first K codebooks (default: the codec's own)")
    add("--device", default="cpu", metavar="cpu|cuda", help="where the codec runs; cuda:1 is the second GPU")
    add("--tasks", type=positive, default=1, metavar="N", help="split the work into N tasks")
    add("--task", type=whole, default=0, metavar="I", help="do task I of 0..N-1")
    add("--workers", type=whole, metavar="N", help="processes that read and encode (default: one per core; 0: none)")
    add("--compress", action="store_true", help="entropy-code the shards, losslessly; readers need not know")
    add("--with-mel", type=positive, metavar="BANDS",
        help="store an 8-bit log-mel plane of this many bands (80) too, for model.input mel or both")  # fmt: skip
    add("--shard-inputs", type=positive, default=8192, metavar="N", help="inputs per shard")
    add(
        "--block-inputs",
        type=positive,
        default=2048,
        metavar="N",
        help="inputs per block; a kill loses a block at most",
    )
    add("--strict", action="store_true", help="exit 1 when an input could not be read")
    add("--stall-minutes", type=amount, default=0.0, metavar="M",
        help="end with exit code 76 when no input was finished for M minutes (0: never)")  # fmt: skip


def _add_dataset_commands(command: Command) -> None:
    sub = command("verify", "check every byte and every count of a dataset, and encode a few utterances again")
    _add_dataset(sub)
    sub.add_argument("--sample", type=whole, default=4, metavar="N", help="utterances to encode again and compare")
    sub.add_argument("--weights", metavar="PATH", help="the codec's weights, where they have moved")
    sub = command("repair", "encode the damaged shards of a dataset again; the others stay as they are")
    _add_dataset(sub)
    sub.add_argument(
        "--workers", type=whole, metavar="N", help="processes that read and encode (default: one per core)"
    )
    sub.add_argument("--weights", metavar="PATH", help="the codec's weights, where they have moved")
    sub = command("status", "how far a run is, from its files alone")
    _add_dataset(sub)
    sub.add_argument(
        "--tasks", type=positive, metavar="N", help="of the run, to tell which task an unfinished shard is of"
    )
    sub = command("stats", "hours, bits, and the use and entropy of each codebook")
    _add_dataset(sub)
    sub.add_argument("--plot", type=Path, metavar="PNG", help="draw the histograms of the codes")
    add = command("decode", "turn one utterance's codes back into audio").add_argument
    add("dataset", type=Path, metavar="DIR")
    add("--id", required=True, help="the utterance's id")
    add("--output", "-o", type=Path, required=True, metavar="WAV", help="audio file to write")
    add("--num-codebooks", type=positive, metavar="K", help="use the first K codebooks only")
    add("--weights", metavar="PATH", help="the codec's weights, where they have moved")


def _add_dataset(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("dataset", type=Path, metavar="DIR")
    sub.add_argument("--json", action="store_true", help="print JSON")


def _add_codec_commands(command: Command) -> None:
    sub = command("codecs", "list the codecs, or load one, print its card and remember the path of its weights")
    sub.add_argument("codec", nargs="?", metavar="NAME@PATH", help=CODEC)
    sub = command("check-codec", "how many codes change on this device with the batch, the cut, the implementation")
    sub.add_argument("codec", metavar="NAME|PATH", help=CODEC)
    sub.add_argument("sources", nargs="*", metavar="SOURCE", help="audio to check with (default: noise and tones)")
    sub.add_argument(
        "--num-codebooks", type=positive, metavar="K", help="the first K codebooks (default: the codec's own)"
    )
    sub.add_argument("--device", default="cpu", metavar="cpu|cuda", help="where the codec runs")
    sub.add_argument("--seconds", type=amount, default=120.0, help="of audio to use at most")
    sub.add_argument("--json", action="store_true", help="print JSON")
    add = command("bench", "time ours beside the plain way: the reference model, file by file").add_argument
    add("sources", nargs="+", metavar="SOURCE", help="audio to encode")
    add("--codec", default="tiny_16khz", metavar="NAME|PATH", help=CODEC)
    add("--num-codebooks", type=positive, metavar="K", help="the first K codebooks (default: the codec's own)")
    add("--device", default="cpu", metavar="cpu|cuda", help="where the codec runs")
    add("--seconds", type=amount, default=120.0, help="of audio to use at most")
    add("--rounds", type=positive, default=3, help="each way runs so often, in turns; the fastest counts")
    add("--json", action="store_true", help="print JSON, a line per measurement")
    add = command("train-codec", "train tiny_16khz anew, on a manifest of audio").add_argument
    add("manifest", type=Path, metavar="JSONL", help="rows with path, task and, where known, speaker")
    add("--output", "-o", type=Path, required=True, metavar="DIR", help="checkpoints, log and weights")
    add("--steps", type=positive, help="training steps (default: the shipped codec's)")
    sub = command("eval-codec", "mel distance, SI-SDR and code usage on held-out clips")
    sub.add_argument("manifest", type=Path, metavar="JSONL")
    sub.add_argument(
        "--codec",
        action="append",
        required=True,
        metavar="NAME|PATH[:K]",
        help="repeat to compare; :K keeps K codebooks",
    )
    sub.add_argument("--clips", type=positive, default=120, help="held-out clips, evenly spread over the tasks")
    sub.add_argument("--json", action="store_true", help="print JSON")


def main(argv: list[str] | None = None) -> int:
    """Run a command; 0 done, 1 a clear error, 2 usage, 75 stopped by a signal, 76 stuck, 130 interrupted."""
    args = parser().parse_args(argv)
    try:
        commands = importlib.import_module("codecssl.tokenize.commands")
        return getattr(commands, args.command.replace("-", "_"))(args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        if error.errno not in REFUSED:
            raise
        where = error.filename or getattr(args, "output", None) or getattr(args, "dataset", "the output")
        what = f"{os.strerror(error.errno)}; make it usable, or give another path"
        if error.errno in FULL:
            what = "disk full; make room and run the same command again"
        print(f"error: {where}: {what}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped; run the same command again to go on from the last whole block", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(guarded(main))
