"""Subcommands that fill the token cache and measure the time it saves."""

import argparse
from pathlib import Path
from typing import Any

from codecssl.superb.commands.common import DEVICE, SIDE, open_data
from codecssl.tokenize.common.command_line import CommandLine, add_codec_weights, console, positive, whole
from codecssl.tokenize.common.files import refuse_links_out


def add_commands(line: CommandLine) -> None:
    """Add `cache` and `bench`."""
    group = "token cache"
    cache = line.command(
        "cache",
        _cache,
        group=group,
        help="encode the audio of tasks once, into token shards that run --cache reads",
        example="cache --upstream model --tasks ks,sid --data corpora --output cache",
        resume="resumes after the last whole block",
    )
    cache.add_argument(
        "--upstream",
        action="append",
        required=True,
        metavar="MODEL|CODEC",
        help="an exported model's folder, or a codec as in codecssl-tokenize; repeat for several",
    )
    cache.add_argument("--tasks", default="all", help="comma-separated; or all")
    cache.add_argument("--data", required=True, metavar="ROOT|sample", help="as in run")
    cache.add_argument("--side", type=Path, metavar="DIR", help=SIDE)
    cache.add_argument("--output", required=True, type=Path, metavar="DIR", help="the cache; may hold earlier sets")
    cache.add_argument("--device", default="cpu", help=f"{DEVICE}; its codes serve runs on that kind of device only")
    add_codec_weights(cache)
    cache.add_argument("--workers", type=whole, help="processes (default: one per core, none for few waves)")
    bench = line.command(
        "bench",
        _bench,
        group=group,
        help="seconds of an epoch without and with the token and the feature cache",
        example="bench --task ks --data sample",
    )
    bench.add_argument("--codec", default="tiny_16khz", metavar="NAME|PATH", help="as in codecssl-tokenize")
    bench.add_argument("--task", default="ks,sid,ic", help="comma-separated tasks with a linear head")
    bench.add_argument("--data", default="sample", metavar="ROOT|sample", help="as in run")
    bench.add_argument("--utterances", type=int, default=96, help="maximum number of training utterances in an epoch")
    bench.add_argument(
        "--rounds", type=positive, default=2, help="interleaved runs of each variant; the fastest is reported"
    )
    bench.add_argument("--threads", type=positive, default=1, help="threads of torch; small heads do not need more")
    bench.add_argument("--json", action="store_true", help="print JSON, one line per task")


def _cache(arguments: argparse.Namespace) -> None:
    from codecssl.superb.runner.prefill import fill_all, jobs
    from codecssl.superb.tasks import choose
    from codecssl.superb.upstreams.names import parse_all
    from codecssl.tokenize.common.errors import UserError

    refuse_links_out(arguments.output)
    upstreams = parse_all([_named(name) for name in arguments.upstream])
    if plain := [upstream.name for upstream in upstreams if not upstream.reads_codes]:
        raise UserError(f"upstream {plain[0]}: reads waves, not codes; give an exported model or a codec")
    tasks, corpus = choose(arguments.tasks), open_data(arguments.data, arguments.output, arguments.side)
    options: dict[str, Any] = {"device": arguments.device, "workers": arguments.workers}
    out = console(soft_wrap=True)
    fill_all(list(jobs(upstreams, tasks, corpus, arguments.output, **options)), out)
    out.print(f"{arguments.output}: complete for {', '.join(task.name for task in tasks)}")


def _named(name: str) -> str:
    """Parse the name of an upstream. Any other word is taken for the name of a codec."""
    from codecssl.superb.upstreams.names import parse
    from codecssl.tokenize.common.errors import UserError

    try:
        return parse(name).name
    except UserError:
        return f"codes:{name}"


def _bench(arguments: argparse.Namespace) -> None:
    import tempfile

    from codecssl.superb import bench

    chosen = ("utterances", "rounds", "threads", "codec")
    config = bench.SuperbBenchConfig(tasks=arguments.task, **{name: getattr(arguments, name) for name in chosen})
    with tempfile.TemporaryDirectory() as folder:
        rows = bench.run(config, open_data(arguments.data, Path(folder)))
    if arguments.json:
        print(bench.as_lines(rows))
    else:
        console(width=120).print(bench.console_table(rows))
