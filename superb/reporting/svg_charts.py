"""Small SVG charts for a self-contained page, without scripts, fonts or other files."""

from collections.abc import Sequence
from html import escape
from math import isfinite

PALETTE = (
    "#0072b2",
    "#d55e00",
    "#009e73",
    "#cc79a7",
    "#e69f00",
    "#56b4e9",
    "#666666",
)  # distinguishable by colour-blind readers
Series = tuple[str, str, Sequence[tuple[float, float]]]  # label, colour, points


def line_chart(
    title: str, series: Sequence[Series], width: int = 430, height: int = 250, *, x_label: str = "step"
) -> str:
    """Lines over a common x axis; non-finite points (a diverged loss) are omitted."""
    series = [(label, colour, [point for point in line if isfinite(point[1])]) for label, colour, line in series]
    points = [point for _, _, line in series for point in line]
    if not points:
        return ""
    left, right, top, bottom = 46, 12, 26, 34
    x_ticks = ticks(0, max(1.0, *(x for x, _ in points)))
    y_ticks = ticks(min(0.0, *(y for _, y in points)), max(y for _, y in points))

    def place(x: float, y: float) -> tuple[float, float]:
        across = left + (width - left - right) * (x - x_ticks[0]) / (x_ticks[-1] - x_ticks[0])
        return across, height - bottom - (height - top - bottom) * (y - y_ticks[0]) / (y_ticks[-1] - y_ticks[0])

    parts = [f'<text class="title" x="{left}" y="16">{escape(title)}</text>']
    for y in y_ticks:
        parts.append(_line(place(x_ticks[0], y), place(x_ticks[-1], y), "grid"))
        parts.append(_text(left - 6, place(0, y)[1] + 4, f"{y:g}", "end"))
    for x in x_ticks:
        parts.append(_text(place(x, 0)[0], height - bottom + 16, f"{x:g}", "middle"))
    parts.append(_text((left + width - right) / 2, height - 4, x_label, "middle"))
    for label, colour, line in series:
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(*point) for point in line))
        style = f'fill="none" stroke="{colour}" stroke-width="2"'
        parts.append(f'<polyline points="{path}" {style}>{_tip(label)}</polyline>')
        parts += [_dot(place(*point), colour, f"{label}: {x_label} {point[0]:g}, {point[1]:.4g}") for point in line]
    return _svg(width, height, parts)


def heat_chart(title: str, rows: Sequence[str], values: Sequence[Sequence[float]], *, width: int = 430) -> str:
    """Coloured cells of values, with row names and column numbers from 0. Darker is a larger share of the row."""
    left, top, cell_height = 60, 46, 26
    columns = max(len(row) for row in values)
    cell_width = (width - left - 8) / columns
    most = max(max(row) for row in values)
    parts = [f'<text class="title" x="{left}" y="16">{escape(title)}</text>']
    parts += [_text(left + (c + 0.5) * cell_width, top - 8, str(c), "middle") for c in range(columns)]
    for r, (name, row) in enumerate(zip(rows, values, strict=True)):
        y = top + r * cell_height
        parts.append(_text(left - 8, y + 17, name, "end"))
        for c, value in enumerate(row):
            x, share = left + c * cell_width, value / most
            shape = f'x="{x:.1f}" y="{y}" width="{cell_width - 2:.1f}" height="{cell_height - 2}"'
            tip, paint = (
                _tip(f"{name}, layer {c}: {value:.3f}"),
                f'fill="{PALETTE[0]}" fill-opacity="{share:.3f}"',
            )
            parts.append(f"<rect {shape} {paint}>{tip}</rect>")
            shade = ' class="light"' if share > 0.55 else ""
            place = f'x="{x + cell_width / 2 - 1:.1f}" y="{y + 17}" text-anchor="middle"'
            parts.append(f"<text {place}{shade}>{value:.2f}</text>")
    return _svg(width, top + cell_height * len(rows) + 8, parts)


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` round numbers that cover [low, high]."""
    span = (high - low) or 1.0
    step = next(s for power in range(-9, 12) for base in (1, 2, 5) if (s := base * 10.0**power) * count >= span)
    first, last = low // step, -(-high // step)
    return [round(i * step, 10) for i in range(int(first), int(max(last, first + 1)) + 1)]


def legend(entries: Sequence[tuple[str, str]]) -> str:
    """(label, colour) pairs in one HTML line."""
    items = (f'<span><i style="background:{colour}"></i>{escape(label)}</span>' for label, colour in entries)
    return f'<p class="legend">{"".join(items)}</p>'


def _svg(width: int, height: int, parts: Sequence[str]) -> str:
    size = f'viewBox="0 0 {width} {height}" width="{width}" height="{height}"'
    return f'<svg {size} role="img">{"".join(parts)}</svg>'


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _line(start: tuple[float, float], end: tuple[float, float], style: str) -> str:
    return f'<line class="{style}" x1="{start[0]:.1f}" y1="{start[1]:.1f}" x2="{end[0]:.1f}" y2="{end[1]:.1f}"/>'


def _dot(at: tuple[float, float], colour: str, tip: str) -> str:
    return f'<circle cx="{at[0]:.1f}" cy="{at[1]:.1f}" r="2.5" fill="{colour}">{_tip(tip)}</circle>'


def _tip(text: str) -> str:
    return f"<title>{escape(text)}</title>"
