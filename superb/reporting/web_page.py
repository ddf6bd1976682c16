"""report.html: the tables of tables.py with charts, in one self-contained file."""

from collections.abc import Sequence
from html import escape

from codecssl.superb.reporting.comparison import Comparison, values_of
from codecssl.superb.reporting.svg_charts import PALETTE, heat_chart, legend, line_chart
from codecssl.superb.reporting.tables import notes, percent, table_rows
from codecssl.superb.reporting.verdicts import sentence
from codecssl.superb.tasks import TASKS

TITLE = "codecssl: results"
STYLE = """
:root {
  color-scheme: light dark;
  --ink: #1c2430; --soft: #5b6675; --rule: #d9dee5; --paper: #fff; --tint: #f4f6f9;
}
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6eaf0; --soft: #9aa6b5; --rule: #37414f; --paper: #151a21; --tint: #1d242e; }
}
body {
  font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper);
  max-width: 1200px; margin: 2.5rem auto; padding: 0 1.2rem;
}
h1 { font-size: 1.6rem; margin-bottom: .2rem }
h2 { font-size: 1.15rem; margin: 2.2rem 0 .5rem }
.claim { border-left: 4px solid #d55e00; background: var(--tint); padding: .6rem .9rem; font-weight: 600 }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums }
th, td { text-align: right; padding: .35rem .45rem; border-bottom: 1px solid var(--rule) }
th:first-child, td:first-child { text-align: left; min-width: 7rem; max-width: 15rem; overflow-wrap: anywhere }
th { color: var(--soft); font-weight: 600; font-size: .85rem }
td small { color: var(--soft); display: block; white-space: nowrap }
td b { font-weight: 600 }
td b small { font-weight: 400 }
tr.delta td, tr.chance td { color: var(--soft) }
tr.chance td { font-style: italic }
tr.delta td.up { color: #009e73 }
tr.delta td.down { color: #d55e00 }
.scroll { overflow-x: auto }
.charts { display: flex; flex-wrap: wrap; gap: 1rem }
svg { max-width: 100%; height: auto }
svg text { fill: var(--soft); font: 11px system-ui, sans-serif }
svg text.title { fill: var(--ink); font-weight: 600 }
svg text.light { fill: #fff }
svg .grid { stroke: var(--rule) }
.legend span { margin-right: 1.2rem }
.legend i { display: inline-block; width: 1.1em; height: .25em; margin-right: .4em; vertical-align: middle }
ul { padding-left: 1.2rem; color: var(--soft) }
"""


def html(comparisons: Sequence[Comparison]) -> str:
    """Render the whole page."""
    sections = "".join(_section(comparison) for comparison in comparisons)
    head = f'<meta charset="utf-8"><title>{TITLE}</title><style>{STYLE}</style>'
    body = f"<body><h1>{TITLE}</h1>{sections}</body>"
    return f"<!doctype html><html lang=en><head>{head}</head>{body}</html>\n"


def _section(c: Comparison) -> str:
    colours = {name: PALETTE[i % len(PALETTE)] for i, name in enumerate(c.upstreams)}
    facts = "".join(f"<li>{escape(note)}</li>" for note in notes(c))
    tasks = "; ".join(f"{t}: {TASKS[t].title.lower()} (official corpus: {TASKS[t].corpus})" for t in c.tasks)
    charts = "".join(_curves(c, task, colours) for task in c.tasks)
    return (
        f'<p class="claim">{escape(c.claim)}</p><p>{escape(sentence(c))}</p><h2>On the test set</h2>{_main_table(c)}'
        f"<ul>{facts}<li>{escape(tasks)}</li></ul>{_layers(c)}"
        f"<h2>Learning curves</h2>{legend(list(colours.items()))}<div class=charts>{charts}</div>"
        f"<h2>Selected runs</h2>{_runs(c)}"
    )


def _main_table(c: Comparison) -> str:
    header, body = table_rows(c)
    first, last = 1 + len(c.upstreams), 1 + len(c.upstreams) + len(c.pairs)
    rows = [_row(body[0], "chance")]
    rows += [_row(line, "upstream") for line in body[1:first]]
    rows += [_delta_row(header, line) for line in body[first:last]]
    rows += [_row(line, "chance") for line in body[last:]]
    return _table(header, rows)


def _row(line: Sequence[str], style: str) -> str:
    cells = "".join(f"<td>{_small(text)}</td>" for text in line)
    return f'<tr class="{style}">{cells}</tr>'


def _delta_row(header: Sequence[str], line: Sequence[str]) -> str:
    cells = (f"<td{_direction(head, text)}>{_small(text)}</td>" for head, text in zip(header, line, strict=True))
    return f'<tr class="delta">{"".join(cells)}</tr>'


def _direction(head: str, text: str) -> str:
    """CSS class of a difference. Only significant ones are coloured, green if the upstream is better."""
    if not text.endswith("*"):
        return ""
    return ' class="up"' if (text[0] == "+") == head.endswith("↑") else ' class="down"'


def _small(text: str) -> str:
    if text.startswith("**"):
        return f"<b>{_small(text.strip('*'))}</b>"
    value, mark, rest = escape(text).partition(" ± " if " ± " in text else " (")
    return f"{value}<small>{mark}{rest}</small>" if mark else value


def _table(header: Sequence[str], rows: Sequence[str]) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in header)
    return f"<div class=scroll><table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"


def _layers(c: Comparison) -> str:
    charts = []
    for name in c.upstreams:
        cells = {t: cell for t in c.tasks if (cell := c.cells.get((name, t))) and cell.runs[0]["layer_weights"]}
        if cells:
            weights = [cell.runs[0]["layer_weights"] for cell in cells.values()]
            charts.append(heat_chart(f"{name}: weight of each layer", list(cells), weights))
    if not charts:
        return ""
    how = "<p>Weights of SUPERB's learned sum over hidden states; 0 is the input of the first layer.</p>"
    return f"<h2>Layer weights of the tasks</h2>{how}<div class=charts>{''.join(charts)}</div>"


def _curves(c: Comparison, task: str, colours: dict[str, str]) -> str:
    charts = []
    metric = TASKS[task].metrics[0]
    for tag, title, scale in (
        (f"valid-{metric.key}", f"validation {metric.label}", 100),
        ("train-loss", "training loss, nats", 1),
    ):
        series = []
        for name in c.upstreams:
            if cell := c.cells.get((name, task)):
                points = [(step, scale * value) for step, value in cell.runs[0]["curves"].get(tag, [])]
                series.append((name, colours[name], points))
        charts.append(line_chart(f"{task}: {title}", series))
    return "".join(charts)


def _runs(c: Comparison) -> str:
    header = ["upstream", "task", "test", "valid", "best step", "steps", "lr", "tried", "seed", "fold"]
    header += ["utterances train/valid/test", "s"]
    rows = []
    for name, task, cell in [(n, t, c.cells[n, t]) for n in c.upstreams for t in c.tasks if (n, t) in c.cells]:
        tried = " ".join(f"{lr:g}" for lr in cell.lrs if lr is not None)
        for run in cell.runs:
            counts = "/".join(str(run["utterances"].get(split, "-")) for split in ("train", "valid", "test"))
            tested = ", ".join(f"{m.label} {percent(values_of(run)[m.key])}" for m in TASKS[task].metrics
                               if m.key in values_of(run))  # fmt: skip
            step = "" if run["best_step"] is None else str(run["best_step"])
            lr = "" if run["learning_rate"] is None else f"{run['learning_rate']:g}"
            line = [name, task, tested, percent(run["valid"]), step, f"{run['steps']:,}", lr, tried]
            rows.append(
                _row([*line, str(run["seed"]), str(run.get("fold") or ""), counts, f"{run['seconds']:.0f}"], "")
            )
    return _table(header, rows)
