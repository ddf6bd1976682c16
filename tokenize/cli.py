"""`codecssl-tokenize`: encode audio once, check it, look at it, listen to it."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from codecssl.tokenize.errors import UserError

if TYPE_CHECKING:
    from codecssl.tokenize.run import Progress


def parser() -> argparse.ArgumentParser:
    """The command's arguments; nothing heavy is imported for them."""
    main = argparse.ArgumentParser(prog="codecssl-tokenize", description=__doc__)
    commands = main.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, action: Callable[[argparse.Namespace], int], help: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(
            name, help=help, description=help, formatter_class=argparse.ArgumentDefaultsHelpFormatter
        )
        sub.set_defaults(action=action)
        return sub

    add = command("run", _run, "encode audio into token shards; run it again to resume").add_argument
    add(
        "sources",
        nargs="+",
        metavar="SOURCE",
        help="folder, glob, audio file, or .tsv/.csv/.jsonl manifest (path, [id, start, end in seconds, labels])",
    )
    add("--output", "-o", type=Path, required=True, metavar="DIR", help="the dataset's folder")
    add(
        "--codec",
        default="tiny_16khz",
        metavar="NAME|PATH",
        help="a codec of `codecssl-tokenize codecs`, or its weights",
    )
    add("--num-codebooks", type=int, metavar="K", help="keep the first K codebooks (default: the codec's own)")
    add("--device", default="cpu", choices=["cpu", "cuda"], help="where the codec runs")
    add("--tasks", type=int, default=1, metavar="N", help="split the work into N tasks")
    add("--task", type=int, default=0, metavar="I", help="do task I of 0..N-1")
    add(
        "--workers",
        type=int,
        metavar="N",
        help="processes that decode and encode (default: one per core; 0: none)",
    )
    add("--shard-inputs", type=int, default=8192, metavar="N", help="inputs per shard")
    add("--strict", action="store_true", help="exit 1 when an input could not be read")
    for name, action, help in (
        ("verify", _verify, "check every byte and every count of a dataset"),
        ("status", _status, "how far a run is, from its files alone"),
        ("stats", _stats, "hours, bits, and the use and entropy of each codebook"),
    ):
        sub = command(name, action, help)
        sub.add_argument("dataset", type=Path, metavar="DIR")
        sub.add_argument("--json", action="store_true", help="print JSON")
    add = command("decode", _decode, "turn one utterance's codes back into audio").add_argument
    add("dataset", type=Path, metavar="DIR")
    add("--id", required=True, help="the utterance's id")
    add("--output", "-o", type=Path, required=True, metavar="WAV", help="audio file to write")
    add("--num-codebooks", type=int, metavar="K", help="use the first K codebooks only")
    add("--weights", metavar="PATH", help="the codec's weights, where they have moved")
    command("codecs", _codecs, "list the codecs")
    add = command("bench", _bench, "time ours beside the plain way: the reference model, file by file").add_argument
    add("sources", nargs="+", metavar="SOURCE", help="audio to encode")
    add("--codec", default="tiny_16khz", metavar="NAME|PATH")
    add("--seconds", type=float, default=120.0, help="of audio to use at most")
    add = command("train-codec", _train_codec, "train tiny_16khz anew, on a manifest of audio").add_argument
    add("manifest", type=Path, metavar="JSONL", help="rows with path, task and, where known, speaker")
    add("--output", "-o", type=Path, required=True, metavar="DIR", help="checkpoints, log and weights")
    add("--steps", type=int, help="training steps (default: the shipped codec's)")
    add = command("eval-codec", _eval_codec, "mel distance, SI-SDR and code usage on held-out clips").add_argument
    add("manifest", type=Path, metavar="JSONL")
    add(
        "--codec",
        action="append",
        required=True,
        metavar="NAME|PATH[:K]",
        help="repeat to compare; :K keeps K codebooks",
    )
    add("--clips", type=int, default=120, help="held-out clips, evenly spread over the tasks")
    add("--json", action="store_true", help="print JSON")
    return main


def main(argv: list[str] | None = None) -> int:
    """Run a command; 0 done, 1 a clear error, 2 usage, 130 interrupted."""
    args = parser().parse_args(argv)
    try:
        return args.action(args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        print("stopped; run the same command again to go on from the last whole block", file=sys.stderr)
        return 130


# ---------------------------------------------------------------- commands


def _run(args: argparse.Namespace) -> int:
    from codecssl.tokenize.run import RunConfig, run

    config = RunConfig(
        sources=tuple(args.sources),
        output=args.output,
        codec=args.codec,
        num_codebooks=args.num_codebooks,
        device=args.device,
        tasks=args.tasks,
        task=args.task,
        workers=args.workers,
        shard_inputs=args.shard_inputs,
    )
    began = time.monotonic()
    with _progress() as report:
        totals = run(config, report)
    wall = time.monotonic() - began
    if totals is None:
        print(f"task {args.task} of {args.tasks} is done after {wall:.0f} s; other tasks' shards are still missing")
        return 0
    print(
        f"{args.output}: {totals['utterances']} utterances, {totals['hours']:.3f} h, {totals['bytes'] / 1e6:.2f} MB, "
        f"{totals['failed']} failed, {wall:.0f} s"
    )
    if totals["failed"]:
        print(
            f"{totals['failed']} inputs could not be read: see {args.output / 'failed.jsonl'}",
            file=sys.stderr,
        )
    if not totals["utterances"]:
        raise UserError(
            f"{args.output}: none of {totals['inputs']} inputs could be read; see {args.output / 'failed.jsonl'}"
        )
    return 1 if args.strict and totals["failed"] else 0


@contextmanager
def _progress() -> Iterator[Callable[[Progress], None]]:
    from tqdm import tqdm

    # no total: the stream is not counted twice; what a user watches is the rate and the failures
    with tqdm(unit=" files", mininterval=0.5, disable=None, file=sys.stderr) as bar:
        began = time.monotonic()

        def report(progress: Progress) -> None:
            bar.update(progress.inputs - bar.n)
            rate = progress.seconds / max(time.monotonic() - began, 1e-9)
            bar.set_postfix_str(
                f"{progress.seconds / 3600:.2f} h, {rate:.0f} x real time, {progress.failed} failed",
                refresh=False,
            )

        yield report


def _verify(args: argparse.Namespace) -> int:
    from codecssl.tokenize.verify import verify

    damages = verify(args.dataset)
    if args.json:
        print(json.dumps({"whole": not damages, "damages": damages}))
    elif not damages:
        print(f"{args.dataset}: whole")
    else:
        print("\n".join(damages), file=sys.stderr)
    return 1 if damages else 0


def _status(args: argparse.Namespace) -> int:
    from codecssl.tokenize.status import status

    state = status(args.dataset)
    if args.json:
        print(json.dumps(state))
    else:
        done = "finished" if state["finished"] else "not finished"
        print(
            f"{args.dataset}: {done}; {state['shards']} shards and {state['blocks']} blocks of further ones written, "
            f"{state['inputs']} inputs, {state['hours']:.2f} h, {state['failed']} failed; "
            f"last write {state['age_seconds']:.0f} s ago"
        )
    return 0


def _stats(args: argparse.Namespace) -> int:
    from codecssl.tokenize.stats import stats

    found = stats(args.dataset)
    if args.json:
        print(json.dumps(found))
        return 0
    print(f"codec            {found['codec']}, {found['num_codebooks']} codebooks at {found['frame_rate']:g} frames/s")
    print(f"utterances       {found['utterances']} ({found['failed']} inputs failed)")
    print(f"audio            {found['hours']:.3f} h, {found['frames']} frames, {found['codes']} codes")
    nominal = f"{found['nominal_bits_per_code']:.3f} nominal ({found['overhead']:+.2%})"
    print(f"bits per code    {found['stored_bits_per_code']:.3f} stored in all files, {nominal}")
    print(f"smaller than     PCM16 by {found['ratio_to_pcm16']:.1f} x")
    for k, book in enumerate(found["codebooks"]):
        use = f"{book['used']} of {book['size']} used"
        print(
            f"codebook {k:<2}      {use}, entropy {book['entropy_bits']:.3f} bits, perplexity {book['perplexity']:.1f}"
        )
    return 0


def _decode(args: argparse.Namespace) -> int:
    import soundfile
    import torch

    from codecssl.tokenize.codec import load_codec_for
    from codecssl.tokenize.shards import Shards

    shards = Shards(args.dataset)
    index = shards.find(args.id)
    if args.num_codebooks is not None and not 1 <= args.num_codebooks <= shards.num_codebooks:
        raise UserError(f"--num-codebooks {args.num_codebooks}: the shards hold 1 to {shards.num_codebooks}")
    codec = load_codec_for(shards.card, weights=args.weights)
    codes = torch.from_numpy(shards.codes(index, num_codebooks=args.num_codebooks).astype("int64"))
    wave = codec.decode(codes)[: shards.utterance(index).samples]
    try:
        soundfile.write(args.output, wave.numpy(), shards.card.sample_rate)
    except (soundfile.LibsndfileError, OSError, TypeError, ValueError) as error:
        raise UserError(
            f"{args.output}: cannot be written ({error}); give a .wav or .flac in a folder that exists"
        ) from error
    print(f"{args.output}: {len(wave) / shards.card.sample_rate:.3f} s at {shards.card.sample_rate} Hz")
    return 0


def _codecs(args: argparse.Namespace) -> int:
    from codecssl.tokenize.codec import BACKENDS

    for name, backend in BACKENDS.items():
        print(f"{name:<16} {backend.summary}\n{'':<16} weights: {backend.weights}")
    return 0


def _bench(args: argparse.Namespace) -> int:
    from codecssl.tokenize.bench import bench

    for row in bench(args.sources, args.codec, args.seconds):
        print(row)
    return 0


def _train_codec(args: argparse.Namespace) -> int:
    from codecssl.tokenize.train import TrainConfig, train_codec

    overrides: dict[str, Any] = {} if args.steps is None else {"steps": args.steps}
    print(f"wrote {train_codec(args.manifest, args.output, TrainConfig(**overrides))}")
    return 0


def _eval_codec(args: argparse.Namespace) -> int:
    from codecssl.tokenize.evaluate import evaluate, table

    found = [evaluate(args.manifest, codec, args.clips) for codec in args.codec]
    print(json.dumps(found) if args.json else table(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
