"""The actions of the `codecssl-tokenize` subcommands. Their arguments are in cli.py."""

from __future__ import annotations

import json
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from codecssl.tokenize.common.command_line import progress_bar
from codecssl.tokenize.common.errors import UserError

if TYPE_CHECKING:
    from codecssl.tokenize.common.process import StopSignal
    from codecssl.tokenize.progress import Progress


def run(args: Namespace) -> int:
    from codecssl.tokenize.common.process import StopSignal

    with StopSignal() as stop:  # before the imports, which take seconds
        return _run(args, stop)


def _run(args: Namespace, stop: StopSignal) -> int:
    from codecssl.tokenize.common.process import PREEMPTED, Watchdog
    from codecssl.tokenize.config import TokenizeConfig
    from codecssl.tokenize.format.layout import NOTES
    from codecssl.tokenize.run import Stopped, run

    sources = [_listed(args) if source == "-" else source for source in args.sources]
    config = TokenizeConfig(
        sources=tuple(sources),
        output=args.output,
        codec=args.codec,
        num_codebooks=args.num_codebooks,
        device=args.device,
        tasks=args.tasks,
        task=args.task,
        workers=args.workers,
        entropy_code=args.entropy_code,
        mel_bands=args.with_mel,
        mel_scale=args.mel_scale,
        shard_inputs=args.shard_inputs,
        block_inputs=args.block_inputs,
        retry_failed=args.retry_failed,
    )
    began = time.monotonic()
    hint = "the same command resumes after the last whole block (--stall-minutes sets how long to wait)"
    with Watchdog(args.stall_minutes, hint=hint) as watch, _progress() as bar:

        def on_progress(progress: Progress) -> None:
            watch.report(f"encoding input {progress.inputs + 1} of this task")
            bar(progress)

        try:
            totals = run(config, on_progress, lambda: stop.asked is not None)
        except (Stopped, RuntimeError) as error:  # the signal may have ended a worker too
            if stop.asked is None:
                raise
            kind = "after a whole block" if isinstance(error, Stopped) else "within a block"
            print(f"stopped by {stop.asked} {kind}; the same command resumes from there", file=sys.stderr)
            return PREEMPTED
    wall = time.monotonic() - began
    if totals is None:
        print(f"task {args.task} of {args.tasks} is done after {wall:.0f} s; other tasks' shards are still missing")
        return 0
    print(
        f"{args.output}: {totals['utterances']} utterances, {totals['hours']:.3f} h, {totals['bytes'] / 1e6:.2f} MB, "
        f"{totals['failed']} failed, {wall:.0f} s"
    )
    for note, count in totals.get("notes", {}).items():
        print(f"note: {count} {NOTES.get(note, note)}", file=sys.stderr)
    if totals["failed"]:
        print(
            f"{totals['failed']} inputs could not be read: see {args.output / 'failed.jsonl'}; the same command with "
            "--retry-failed reads them again",
            file=sys.stderr,
        )
    if not totals["utterances"]:
        raise UserError(
            f"{args.output}: none of {totals['inputs']} inputs could be read; see {args.output / 'failed.jsonl'}"
        )
    return 1 if args.strict and totals["failed"] else 0


def _listed(args: Namespace) -> str:
    """Copy the list on standard input to a manifest in the dataset's folder, since a run reads it more than once."""
    from codecssl.tokenize.run import STDIN, refuse_foreign
    from codecssl.tokenize.sources.manifest import spool_stdin

    if args.sources.count("-") > 1:
        raise UserError("source '-': there is one standard input; name it once")
    refuse_foreign(args.output)
    return spool_stdin(sys.stdin.buffer, args.output / STDIN)


@contextmanager
def _progress() -> Iterator[Callable[[Progress], None]]:
    with progress_bar("files") as bar:
        began = time.monotonic()

        def on_progress(progress: Progress) -> None:
            rate = progress.seconds / max(time.monotonic() - began, 1e-9)
            note = f"{progress.seconds / 3600:.2f} h, {rate:.0f} x real time, {progress.failed} failed"
            bar(progress.inputs, progress.total, note)

        yield on_progress


def verify(args: Namespace) -> int:
    from codecssl.tokenize.integrity.verify import examine

    with _shards_bar() as on_progress:
        found = examine(args.dataset, sample=args.sample, weights=args.weights, on_progress=on_progress)
    damages = [str(damage) for damage in found.damages]
    if args.json:
        print(json.dumps({"whole": not damages, "damages": damages, "notes": found.notes}))
        return 1 if damages else 0
    for note in found.notes:
        print(note, file=sys.stderr)
    if damages:
        print("\n".join(damages), file=sys.stderr)
        print(f"codecssl-tokenize repair {args.dataset} encodes the damaged shards again", file=sys.stderr)
        return 1
    print(f"{args.dataset}: whole")
    return 0


def repair(args: Namespace) -> int:
    from codecssl.tokenize.integrity.repair import repair

    with _shards_bar() as on_progress, _progress() as progress:
        done = repair(args.dataset, on_progress, workers=args.workers, weights=args.weights, progress=progress)
    if args.json:
        print(json.dumps({"done": done}))
    else:
        print("\n".join(done) or f"{args.dataset}: intact, nothing to repair")
    return 0


@contextmanager
def _shards_bar() -> Iterator[Callable[[int, int], None]]:
    with progress_bar("shards") as bar:
        yield lambda done, total: bar(done, total, "")


def status(args: Namespace) -> int:
    from codecssl.tokenize.status import status

    state = status(args.dataset, args.tasks)
    if args.json:
        print(json.dumps(state))
        return 0
    done = "finished" if state["finished"] else "not finished"
    total = f" of {state['inputs_total']}" if state["inputs_total"] is not None else ""
    print(
        f"{args.dataset}: {done}; {state['shards']} shards and {state['blocks']} blocks of further ones written, "
        f"{state['inputs']}{total} inputs, {state['hours']:.2f} h, {state['failed']} failed; "
        f"last write {state['age_seconds']:.0f} s ago"
    )
    if not state["finished"] and state["seconds_left"] is not None:
        print(
            f"about {state['seconds_left'] / 60:.0f} minutes left at the rate so far, {state['inputs_per_second']:.1f} "
            f"inputs/s, {state['times_real_time']:.0f} x real time"
        )
    if state["tasks_unfinished"]:
        print(f"unfinished tasks: {_ranges(state['tasks_unfinished'])}")
    for shard in state["stalled"]:
        print("stalled: " + ", ".join(f"{key} {value}" for key, value in shard.items() if value is not None))
    return 0


def _ranges(numbers: list[int]) -> str:
    """Format numbers as ranges for `sbatch --array`, e.g. 0-3,7."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and parts[-1][1] == number - 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in parts)


def stats(args: Namespace) -> int:
    from codecssl.tokenize.measure.stats import lines, stats

    found = stats(args.dataset, plot=args.plot)
    print(json.dumps(found) if args.json else "\n".join(lines(found)))
    return 0


def decode(args: Namespace) -> int:
    import soundfile
    import torch

    from codecssl.tokenize.registry import load_codec_for
    from codecssl.tokenize.shards import Shards

    shards = Shards(args.dataset)
    index = shards.find(args.id)
    if args.num_codebooks is not None and not 1 <= args.num_codebooks <= shards.num_codebooks:
        raise UserError(f"--num-codebooks {args.num_codebooks}: the shards hold 1 to {shards.num_codebooks}")
    codec = load_codec_for(shards.card, weights=args.weights)
    codes = torch.from_numpy(shards.codes(index, num_codebooks=args.num_codebooks).astype("int64"))
    utterance = shards.utterance(index)
    scales = None if utterance.scales is None else torch.from_numpy(utterance.scales)
    wave = codec.decode(codes, scales)[..., : utterance.samples]
    try:
        soundfile.write(args.output, wave.numpy().T, shards.card.sample_rate)
    except (soundfile.LibsndfileError, OSError, TypeError, ValueError) as error:
        raise UserError(
            f"{args.output}: cannot be written ({error}); give a .wav or .flac in a folder that exists"
        ) from error
    print(f"{args.output}: {wave.shape[-1] / shards.card.sample_rate:.3f} s at {shards.card.sample_rate} Hz")
    return 0


def codecs(args: Namespace) -> int:
    from codecssl.tokenize.registry import backends, load_codec

    if args.codec is not None:
        print(json.dumps(load_codec(args.codec).card.to_dict(), indent=1))
        return 0
    for name, backend in backends().items():
        print(f"{name:<16} {backend.summary}\n{'':<16} weights: {backend.weights}")
    return 0


def check_codec(args: Namespace) -> int:
    from codecssl.tokenize.measure.check_codec import check_codec, table, waves_of
    from codecssl.tokenize.registry import load_codec

    codec = load_codec(args.codec, num_codebooks=args.num_codebooks, device=args.device)
    found = check_codec(codec, waves_of(args.sources, codec.card, args.seconds))
    print(json.dumps(found) if args.json else "\n".join(table(found)))
    return 0


def bench(args: Namespace) -> int:
    from codecssl.tokenize.measure.bench import TokenizeBenchConfig, bench, table

    config = TokenizeBenchConfig(
        sources=tuple(args.sources),
        codec=args.codec,
        num_codebooks=args.num_codebooks,
        device=args.device,
        seconds=args.seconds,
        rounds=args.rounds,
    )
    for row in map(json.dumps, bench(config)) if args.json else table(bench(config)):
        print(row, flush=True)
    return 0


def compare(args: Namespace) -> int:
    from codecssl.tokenize.measure import compare_report
    from codecssl.tokenize.measure.compare import CompareConfig, compare

    config = CompareConfig(
        codecs=tuple(args.codecs),
        data=tuple(args.data),
        labels=tuple(args.label),
        where=tuple(args.where),
        clips=args.clips,
        seconds=args.seconds,
        device=args.device,
    )
    found = compare(config, lambda line: print(line, file=sys.stderr, flush=True))
    print(json.dumps(found) if args.json else compare_report.markdown(found))
    if args.output is not None:
        written = compare_report.write(args.output, found)
        print(f"wrote {', '.join(path.name for path in written)} in {args.output}", file=sys.stderr)
    return 0


def train_codec(args: Namespace) -> int:
    from codecssl.tokenize.codec_training.train import CodecTrainConfig, train_codec

    overrides: dict[str, Any] = {} if args.steps is None else {"steps": args.steps}
    print(f"wrote {train_codec(args.manifest, args.output, CodecTrainConfig(**overrides))}")
    return 0


def eval_codec(args: Namespace) -> int:
    from codecssl.tokenize.codec_training.evaluate import evaluate, table

    found = [evaluate(args.manifest, codec, args.clips) for codec in args.codec]
    print(json.dumps(found) if args.json else table(found))
    return 0
