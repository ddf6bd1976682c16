"""The commands of codecssl-superb about the token cache: fill it, and show what it saves."""

import argparse
from pathlib import Path
from typing import Any


def add_commands(commands: Any, shape: Any) -> None:
    """`cache` and `bench`, among the other commands."""
    cache = commands.add_parser(
        "cache", help="encode the audio of tasks once, into token shards that run --cache reads", formatter_class=shape
    )
    cache.set_defaults(command=_cache)
    cache.add_argument(
        "--upstream",
        action="append",
        required=True,
        metavar="MODEL|CODEC",
        help="an exported model's folder, or a codec as in codecssl-tokenize; repeat for several",
    )
    cache.add_argument("--tasks", default="all", help="comma-separated; or all")
    cache.add_argument("--data", required=True, metavar="ROOT|sample", help="as in run")
    cache.add_argument("--side", type=Path, metavar="DIR", help="small lists of official corpora")
    cache.add_argument("--output", required=True, type=Path, metavar="DIR", help="the cache; may hold earlier sets")
    cache.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N; its codes serve runs on that kind only")
    cache.add_argument("--workers", type=int, help="processes; default: one per core, none for few waves")

    bench = commands.add_parser(
        "bench", help="seconds of an epoch without and with the token and the feature cache", formatter_class=shape
    )
    bench.set_defaults(command=_bench)
    bench.add_argument("--codec", default="tiny_16khz", metavar="NAME|PATH", help="as in codecssl-tokenize")
    bench.add_argument("--task", default="ks,sid,ic", help="comma-separated tasks with a linear head")
    bench.add_argument("--data", default="sample", metavar="ROOT|sample", help="as in run")
    bench.add_argument("--utterances", type=int, default=96, help="of the training set in an epoch, at most")
    bench.add_argument("--rounds", type=int, default=2, help="each way runs so often, in turns; the fastest counts")
    bench.add_argument("--threads", type=int, default=1, help="of torch; heads so small gain nothing by more")
    bench.add_argument("--json", action="store_true", help="print JSON, a line per task")


def open_data(data: str, output: Path, side: Path | None = None) -> Any:
    """The corpus that --data names."""
    from codecssl.superb.corpora.corpus import open_corpus
    from codecssl.superb.sample.unpack import unpack

    return open_corpus(unpack(output / "sample") if data == "sample" else Path(data), side)


def _cache(arguments: argparse.Namespace) -> int:
    from rich.console import Console

    from codecssl.superb.runner.prefill import fill_all, jobs
    from codecssl.superb.tasks import choose
    from codecssl.superb.upstreams.expert import parse_all
    from codecssl.tokenize.common.errors import UserError

    upstreams = parse_all([_named(name) for name in arguments.upstream])
    if plain := [upstream.name for upstream in upstreams if not upstream.reads_codes]:
        raise UserError(f"upstream {plain[0]}: reads waves, not codes; give an exported model or a codec")
    tasks, corpus = choose(arguments.tasks), open_data(arguments.data, arguments.output, arguments.side)
    options: dict[str, Any] = {"device": arguments.device, "workers": arguments.workers}
    console = Console(highlight=False, soft_wrap=True)
    fill_all(list(jobs(upstreams, tasks, corpus, arguments.output, **options)), console)
    console.print(f"{arguments.output}: whole for {', '.join(task.name for task in tasks)}")
    return 0


def _named(name: str) -> str:
    """An upstream's name; what is none is taken for a codec's."""
    from codecssl.superb.upstreams.expert import parse
    from codecssl.tokenize.common.errors import UserError

    try:
        return parse(name).name
    except UserError:
        return f"codes:{name}"


def _bench(arguments: argparse.Namespace) -> int:
    import tempfile

    from rich.console import Console

    from codecssl.superb import bench

    chosen = ("utterances", "rounds", "threads", "codec")
    config = bench.BenchConfig(tasks=arguments.task, **{name: getattr(arguments, name) for name in chosen})
    with tempfile.TemporaryDirectory() as folder:
        rows = bench.run(config, open_data(arguments.data, Path(folder)))
    if arguments.json:
        print(bench.as_lines(rows))
    else:
        Console(highlight=False, width=120).print(bench.console_table(rows))
    return 0


def fill_before(arguments: argparse.Namespace, console: Any) -> None:
    """What `run` does first: the codes of its tasks, for those of its upstreams that read codes."""
    from codecssl.superb.runner.prefill import fill_all, jobs
    from codecssl.superb.tasks import choose
    from codecssl.superb.upstreams.expert import parse_all

    upstreams, tasks = parse_all(arguments.upstream), choose(arguments.tasks)
    if any(upstream.reads_codes for upstream in upstreams):
        corpus = open_data(arguments.data, arguments.output, getattr(arguments, "side", None))
        root = arguments.cache or arguments.output / "cache"
        fill_all(list(jobs(upstreams, tasks, corpus, root, device=arguments.device)), console)
