"""Write the report of comparisons: report.md and report.html."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from codecssl.superb import results
from codecssl.superb.reporting.comparison import Comparison
from codecssl.superb.reporting.tables import markdown
from codecssl.superb.reporting.web_page import html


def write(comparisons: Sequence[Comparison], folder: Path) -> list[Path]:
    """Write report.md and report.html into `folder`, each atomically. Return their paths."""
    texts: dict[str, Any] = {"report.md": markdown(comparisons), "report.html": html(comparisons)}
    for name, text in texts.items():
        results.write_text(folder / name, text)
    return [folder / name for name in texts]
