"""Models that ship with the package, by name. `pretrain/weights/NAME` is a folder written by `export`."""

from pathlib import Path

FOLDER = Path(__file__).resolve().parents[1] / "weights"


def shipped_models() -> list[str]:
    """Return the names of the models in the package."""
    return sorted(path.parent.name for path in FOLDER.glob("*/config.json"))


def model_folder(path: str | Path) -> Path:
    """Return the folder of a model: the path itself if it exists, else the shipped model of that name."""
    folder = Path(path)
    return FOLDER / folder if not folder.exists() and str(path) in shipped_models() else folder
