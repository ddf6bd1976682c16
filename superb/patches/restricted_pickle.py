"""Pickle module for s3prl that creates only its encoders and plain data. A run folder cannot execute code.

s3prl keeps the labels' encoder and the arguments of its task in a run folder as pickles, and reads them when a run
resumes. `pickle.load` calls whatever a pickle names. Here, anything but the classes in `ALLOWED` is an error.
"""

import importlib
import pickle
from types import SimpleNamespace
from typing import IO, Any

from codecssl.tokenize.common.errors import UserError

ENCODERS = {
    "s3prl.dataio.encoder.category": ("CategoryEncoder", "CategoryEncoders"),
    "s3prl.dataio.encoder.tokenizer": (
        "CharacterTokenizer",
        "CharacterSlotTokenizer",
        "WordTokenizer",
        "PhonemeTokenizer",
    ),
}
"""Classes that s3prl's SUPERB problems pickle: plain objects whose state is lists and dictionaries."""
PLAIN = {
    "collections": ("OrderedDict",),
    "builtins": ("set", "frozenset", "complex", "slice", "range", "bytearray"),
    "pathlib": ("Path", "PosixPath", "PurePath", "PurePosixPath"),
}
ALLOWED = {(module, name) for names in (ENCODERS, PLAIN) for module, group in names.items() for name in group}
TABLE = "codecssl.dataframe"
"""Key under which `dump` writes the columns of a pandas table."""
PROBLEMS = ("asv.superb_asv", "asr.superb_asr", "asr.superb_sf", "common.superb_sid", "common.superb_ks",
            "common.superb_ic", "base")  # fmt: skip
"""Modules of s3prl.problem that load pickles."""


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in ALLOWED:
            where = getattr(self.file, "name", "a pickle")
            raise UserError(f"{where}: holds {module}.{name}, which current runs do not write; remove the run's folder")
        return super().find_class(module, name)

    def __init__(self, file: IO[bytes]) -> None:
        super().__init__(file)
        self.file = file


def dump(value: Any, file: IO[bytes]) -> None:
    """Write an object as `pickle.dump` does. Pandas tables become lists, since their pickles need a dozen functions."""
    import pandas

    pickle.dump({TABLE: value.to_dict("list")} if isinstance(value, pandas.DataFrame) else value, file)


def load(file: IO[bytes]) -> Any:
    """Read one object, as `pickle.load`. Raises UserError for a class that is not in `ALLOWED`, and for damage."""
    import pandas

    try:
        found = _Unpickler(file).load()
        return pandas.DataFrame(found[TABLE]) if isinstance(found, dict) and found.keys() == {TABLE} else found
    except UserError:
        raise
    except Exception as error:  # damaged bytes may raise anything
        where = getattr(file, "name", "a pickle")
        raise UserError(f"{where}: damaged ({type(error).__name__}); remove the run's folder and run again") from error


def install() -> None:
    """Make s3prl's problems read and write pickles by `load` and `dump`; idempotent."""
    limited = SimpleNamespace(load=load, dump=dump)
    for name in PROBLEMS:
        importlib.import_module(f"s3prl.problem.{name}").pickle = limited  # type: ignore[attr-defined]
