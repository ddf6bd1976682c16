"""Best upstream of a comparison and its significance, by paired tests over test utterances."""

from codecssl.superb.paired import LEVEL, sign_flip_p
from codecssl.superb.reporting.comparison import Cell, Comparison
from codecssl.superb.tasks import TASKS


def errors(cell: Cell) -> tuple[list[tuple[int, int]], list[int]] | None:
    """(seed, fold) of each run and the errors of its test utterances, in order. None if a run has no errors stored."""
    found: list[int] = []
    for run in cell.runs:
        if run.get("errors") is None:
            return None
        found += run["errors"]
    return [(run["seed"], run.get("fold") or 0) for run in cell.runs], found


def paired_p(one: Cell, other: Cell) -> float | None:
    """p of the exact sign-flip test over test utterances. None if the two cells have different test utterances.

    Errors of an utterance are summed over seeds.
    """
    found = errors(one), errors(other)
    if found[0] is None or found[1] is None or found[0][0] != found[1][0] or len(found[0][1]) != len(found[1][1]):
        return None
    by_utterance: dict[tuple[int, int], int] = {}
    start = 0
    for run in one.runs:
        for i in range(len(run["errors"])):
            key = (run.get("fold") or 0, i)
            delta = found[0][1][start + i] - found[1][1][start + i]
            by_utterance[key] = by_utterance.get(key, 0) + delta
        start += len(run["errors"])
    return sign_flip_p(list(by_utterance.values()))


def best(c: Comparison, task: str) -> str | None:
    """Upstream with the best first metric of a task. None for fewer than two upstreams, and for a tie."""
    sign = 1 if TASKS[task].higher_better else -1
    column = (task, TASKS[task].metrics[0])
    values = {name: sign * value for name in c.upstreams if (value := c.value(name, column)) is not None}
    leaders = [name for name, value in values.items() if value == max(values.values())]
    return leaders[0] if len(values) > 1 and len(leaders) == 1 else None


def beyond_noise(c: Comparison, name: str, task: str) -> bool:
    """True if an upstream is the best of a task, with p below the level against each other one."""
    others = [c.cells[other, task] for other in c.upstreams if other != name and (other, task) in c.cells]
    found = [paired_p(c.cells[name, task], cell) for cell in others]
    return best(c, task) == name and all(p is not None and p < LEVEL for p in found)


def sentence(c: Comparison) -> str:
    """Sentence on the best upstream and its significance. Empty for one upstream."""
    if len(c.upstreams) < 2:
        return ""
    leaders = {task: best(c, task) for task in c.tasks}
    counts = {name: [task for task in c.tasks if leaders[task] == name] for name in c.upstreams}
    most = max(map(len, counts.values()))
    winners = [name for name in c.upstreams if len(counts[name]) == most]
    if not most or len(winners) > 1:
        return f"No upstream wins: {_shares(counts)} of {len(c.tasks)} tasks."
    winner, won = winners[0], counts[winners[0]]
    clear = [task for task in won if beyond_noise(c, winner, task)]
    close = [task for task in won if task not in clear]
    lost = [f"{task} ({leaders[task] or 'a tie'})" for task in c.tasks if task not in won]
    parts = [f"{winner} is best on {len(won)} of {len(c.tasks)} tasks"]
    parts += [f"significantly better than every other upstream on {len(clear)} ({', '.join(clear)})" if clear else ""]
    parts += [f"not significantly better on {', '.join(close)}" if close else ""]
    parts += [f"others are best on {', '.join(lost)}" if lost else ""]
    return "; ".join(part for part in parts if part) + f" (paired over test utterances, {LEVEL:.0%})."


def _shares(counts: dict[str, list[str]]) -> str:
    parts = [f"{name} is best on {len(tasks)}" for name, tasks in counts.items() if tasks]
    return ", ".join(parts) or "none is best on any"
