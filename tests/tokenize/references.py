"""The authors' own implementations, with which ours are compared where they are there.

A package of PyPI is imported if it is installed. Code that is in no registry is imported from a clone in the folder
$CODECSSL_REFERENCES, named as its repository. Tests skip without them.
"""

import importlib
import os
import sys
import types
from pathlib import Path

import pytest


def installed(module, command, *unneeded):
    """Import a module of a package; skip unless it is installed. unneeded: modules that it imports and we do not."""
    for name in unneeded:
        if name not in sys.modules:
            sys.modules[name] = _Stub(name)
    try:
        return importlib.import_module(module)
    except ImportError as error:
        pytest.skip(f"needs {command} ({error})")


def cloned(repository, monkeypatch):
    """Make the modules of a clone importable for one test; skip unless it is there."""
    folder = Path(os.environ.get("CODECSSL_REFERENCES", "none")) / repository.rpartition("/")[2]
    if not folder.is_dir():
        pytest.skip(f"needs a clone of {repository} in the folder $CODECSSL_REFERENCES")
    monkeypatch.syspath_prepend(str(folder))
    return folder


class _Stub(types.ModuleType):
    """A module in which every name is a class."""

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})
