"""codecssl-pretrain: train on token shards, export the model, look at a run."""

import argparse
import difflib
import errno
import sys
from collections.abc import Sequence
from pathlib import Path

from codecssl.configs.load import load_config, names, to_yaml
from codecssl.pretrain.config import RunConfig
from codecssl.tokenize.common.errors import TransientError, UserError
from codecssl.tokenize.common.process import CRASHED, StopSignal


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns 0 done, 1 an error told on one line, 2 wrong usage (argparse exits with it)."""
    arguments, overrides = _parser().parse_known_args(_joined(sys.argv[1:] if argv is None else argv))
    if overrides and arguments.command not in ("run", "bench"):
        _parser().error(f"unrecognized arguments: {' '.join(overrides)}")
    try:
        _no_misspelt_option(overrides)
        arguments.action(arguments, overrides)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return CRASHED if isinstance(error, TransientError) else 1
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        if not full and error.filename is None:
            raise
        where = error.filename or getattr(arguments, "output", None) or "the output"
        how = "disk full; make room and run the same command again, what was saved before is whole"
        print(f"error: {where}: {how if full else error.strerror}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        how = "; the same command goes on from the newest checkpoint" if arguments.command == "run" else ""
        print(f"error: interrupted{how}", file=sys.stderr)
        return 1
    return 0


def _joined(argv: Sequence[str]) -> list[str]:
    """`--section.key VALUE` as one word, which may stand anywhere: argparse would take VALUE for an argument."""
    words: list[str] = []
    for word in argv:
        last = words[-1] if words else ""
        valueless = last.startswith("--") and "." in last and "=" not in last
        if valueless and not word.startswith("--"):
            words[-1] = f"{last}={word}"
        else:
            words.append(word)
    return words


def _no_misspelt_option(overrides: Sequence[str]) -> None:
    """UserError for `--otput`, before it is looked for among the sections of the config."""
    options = ("--data", "--output", "--profile", "--print_config", "--seed")
    for word in overrides:
        name = word.partition("=")[0]
        near = difflib.get_close_matches(name, options, n=1, cutoff=0.7)
        if name.startswith("--") and "." not in name and near and name not in options:
            raise UserError(f"option {name}: unknown; did you mean {near[0]}?")


def _config(arguments: argparse.Namespace, overrides: list[str]) -> RunConfig:
    if arguments.data:
        overrides = [*overrides, f"--data.dirs=[{', '.join(_quoted(path) for path in arguments.data)}]"]
    return load_config(RunConfig, "pretrain", arguments.config, overrides)


def _run(arguments: argparse.Namespace, overrides: list[str]) -> None:
    config = _config(arguments, overrides)
    if arguments.print_config:
        print(to_yaml(config), end="")
        return
    if arguments.output is None:
        raise UserError("--output: not given; name the run's folder with --output RUN")
    with StopSignal() as stop:  # from here on: importing torch and DeepSpeed takes long enough for a signal to come
        from codecssl.pretrain.run import run

        run(config, arguments.output, profile=arguments.profile, stop=stop)


def _export(arguments: argparse.Namespace, overrides: list[str]) -> None:
    from codecssl.pretrain.export.export import export

    export(arguments.run, arguments.output)
    print(f"{arguments.output}: model.safetensors, config.json and a model card written")


def _bench(arguments: argparse.Namespace, overrides: list[str]) -> None:
    config = _config(arguments, overrides)
    import json

    from codecssl.pretrain.bench import bench, table

    rows = bench(
        config,
        seconds=arguments.seconds,
        clip_seconds=arguments.clip_seconds,
        steps=arguments.steps,
        hubert=not arguments.no_hubert,
    )
    for row in map(json.dumps, rows) if arguments.json else table(rows):
        print(row, flush=True)


def _label(arguments: argparse.Namespace, overrides: list[str]) -> None:
    import json

    from codecssl.pretrain.labels.label import LabelConfig, label

    found = label(
        LabelConfig(
            source=arguments.source,
            data=tuple(arguments.data),
            output=arguments.output,
            layer=arguments.layer,
            clusters=arguments.clusters,
            sample_frames=arguments.sample_frames,
            utterance_frames=arguments.utterance_frames,
            clustering=arguments.clustering,
            codec_weights=arguments.codec_weights,
            device=arguments.device,
            seed=arguments.seed,
            tasks=arguments.tasks,
            task=arguments.task,
        )
    )
    if found is None:
        print(f"task {arguments.task} of {arguments.tasks} is done; other tasks' shards are still missing")
        return
    print(json.dumps(found, indent=1))
    numbered = sorted(arguments.output.glob("[0-9]*-*"), key=lambda path: int(path.name.partition("-")[0]))
    quoted = ", ".join(_quoted(str(path)) for path in numbered or [arguments.output])
    print(f'{arguments.output}: train with --objective.target labels --data.labels="[{quoted}]"')


def _status(arguments: argparse.Namespace, overrides: list[str]) -> None:
    import json

    from codecssl.pretrain.monitor.status import lines, status

    state = status(arguments.run)
    print(json.dumps(state) if arguments.json else "\n".join(lines(arguments.run, state)))


def _quoted(path: str) -> str:
    return "'" + path.replace("'", "''") + "'"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="codecssl-pretrain", description=__doc__, allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser(
        "run",
        allow_abbrev=False,
        help="train; resumes what RUN holds",
        description="Train as CONFIG says; go on from the newest checkpoint in RUN, if it has one.",
        epilog="Any value of the config: --section.key VALUE (--print_config shows them all).",
    )
    run.add_argument("config", metavar="CONFIG", help=f"a YAML file, or one of {', '.join(names('pretrain'))}")
    run.add_argument("--data", metavar="DIR", nargs="+", help="folders of token shards, all of one codec")
    run.add_argument("--output", metavar="RUN", type=Path, help="the run's folder")
    run.add_argument("--profile", action="store_true", help="write a torch trace of some steps into RUN/profile")
    run.add_argument("--print_config", "--print-config", action="store_true", help="print the whole config and stop")
    label = commands.add_parser(
        "label",
        allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        help="k-means labels of a model's features, as targets of another run",
        description="Label every frame of token shards by the cluster of its features; one clustering for all data.",
    )
    label.add_argument("source", metavar="RUN|MODEL|latents|JSONL", help="whose features, or a file of ready labels")
    label.add_argument("--data", metavar="DIR", nargs="+", type=Path, required=True, help="folders of token shards")
    label.add_argument(
        "--output", metavar="LABELS", type=Path, required=True, help="their folder; the same command goes on there"
    )
    label.add_argument("--layer", type=int, default=-1, metavar="L", help="0: before the first; -1: the last")
    label.add_argument("--clusters", type=int, default=500, metavar="C", help="how many")
    label.add_argument("--sample-frames", type=int, default=300_000, metavar="N", help="frames to fit k-means to")
    label.add_argument("--utterance-frames", type=int, metavar="N", help="most of them from one utterance")
    label.add_argument("--clustering", type=Path, metavar="FILE", help="use an earlier clustering.safetensors")
    label.add_argument(
        "--codec-weights", metavar="PATH", help="the codec's weights, for latents, where they have moved"
    )
    label.add_argument("--device", default="cpu", help="where the model runs")
    label.add_argument("--seed", type=int, default=0, help="of the sample and of k-means")
    label.add_argument("--tasks", type=int, default=1, metavar="N", help="share the shards among N processes")
    label.add_argument("--task", type=int, default=0, metavar="I", help="this one's number, from 0 to N - 1")
    bench = commands.add_parser(
        "bench",
        allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        help="time a training step beside a plain loop and a waveform HuBERT",
        description="Time training steps of CONFIG on random codes, beside the same model without DeepSpeed and a "
        "waveform HuBERT of the same encoder, in turns in one run; with --data also the loader alone.",
        epilog="Any value of the config: --section.key VALUE.",
    )
    bench.add_argument("config", metavar="CONFIG", help="a YAML file, or a name as for run")
    bench.add_argument("--data", metavar="DIR", nargs="+", help="token shards: their codec, and the loader's speed")
    bench.add_argument("--seconds", type=float, default=30.0, help="of audio in a step")
    bench.add_argument("--clip-seconds", type=float, default=15.0, help="of audio in an item of the batch")
    bench.add_argument("--steps", type=int, default=3, help="each way steps so often, in turns; the fastest counts")
    bench.add_argument("--no-hubert", action="store_true", help="leave the waveform HuBERT out")
    bench.add_argument("--json", action="store_true", help="print JSON, a line per way")
    export = commands.add_parser("export", allow_abbrev=False, help="write the newest checkpoint as a model folder")
    export.add_argument("run", metavar="RUN", type=Path)
    export.add_argument("--output", metavar="MODEL", type=Path, required=True, help="a new or empty folder")
    status = commands.add_parser(
        "status", allow_abbrev=False, help="how far a run is, how fast, who is late; from its files, while it runs"
    )
    status.add_argument("run", metavar="RUN", type=Path)
    status.add_argument("--json", action="store_true", help="print JSON")
    run.set_defaults(action=_run)
    label.set_defaults(action=_label)
    bench.set_defaults(action=_bench)
    export.set_defaults(action=_export)
    status.set_defaults(action=_status)
    return parser


if __name__ == "__main__":
    sys.exit(main())
