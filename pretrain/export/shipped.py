"""Models that are part of the package, by name: `pretrain/weights/NAME` is a folder as `export` writes it."""

from pathlib import Path

FOLDER = Path(__file__).resolve().parents[1] / "weights"


def shipped_models() -> list[str]:
    """Names of the models in the package."""
    return sorted(path.parent.name for path in FOLDER.glob("*/config.json"))


def model_folder(path: str | Path) -> Path:
    """The folder of a model: the path itself where it exists, else the shipped model of that name."""
    folder = Path(path)
    return FOLDER / folder if not folder.exists() and str(path) in shipped_models() else folder
