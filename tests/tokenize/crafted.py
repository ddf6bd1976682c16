"""Hypothesis settings and values for files that somebody crafted or damaged.

`make test` takes the same few examples each time. FUZZ_EXAMPLES=1000 in the environment takes so many new ones.
"""

import copy
import json
import os
from collections.abc import Iterator
from typing import Any

from hypothesis import HealthCheck, Phase, assume, settings
from hypothesis import strategies as st

NASTY = [None, True, -1, 0, 1, 2**31, 2**63, 2**64, 10**40, 0.5, 1e308, "", "x" * 5000, "\x1b[2J", [], [[]], [-1], {}]
"""JSON values of which at least one is wrong at any place."""


def fuzzed(examples: int) -> settings:
    """Settings for `examples` derandomized examples, or for as many random ones as FUZZ_EXAMPLES says."""
    wanted = os.environ.get("FUZZ_EXAMPLES")
    return settings(
        max_examples=int(wanted or examples),
        deadline=None,
        derandomize=wanted is None,
        phases=[Phase.generate],  # shrinking a failure would take minutes
        database=None,
        suppress_health_check=list(HealthCheck),
    )


def places(value: Any, here: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the path of every value inside a JSON document."""
    yield here
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in children:
        yield from places(child, (*here, key))


def change_json(value: Any, data: st.DataObject) -> None:
    """Replace one to three values of a JSON document in place, or remove one."""
    for _ in range(data.draw(st.integers(1, 3))):
        *path, key = data.draw(st.sampled_from([p for p in places(value) if p]))
        parent = value
        for part in path:
            parent = parent[part]
        if isinstance(parent, dict) and len(parent) > 1 and data.draw(st.integers(0, 4)) == 0:
            del parent[key]
        else:
            parent[key] = copy.deepcopy(data.draw(st.sampled_from(NASTY)))
        if not any(p for p in places(value)):
            return


def change_bytes(content: bytes, data: st.DataObject) -> bytes:
    """Cut a file at either end, or flip bits of it, or replace, repeat or insert some bytes. The result differs."""
    found = bytearray(content)
    kind = data.draw(st.sampled_from(["cut", "behead", "flip", "flip", "replace", "insert", "repeat"]))
    at = data.draw(st.integers(0, max(0, len(found) - 1)))
    if kind == "cut":
        del found[at:]
    elif kind == "behead":
        del found[: at + 1]
    elif kind == "replace":
        patch = data.draw(st.binary(min_size=1, max_size=64) | st.just(bytes(600)))
        found[at : at + len(patch)] = patch
    elif kind == "insert":
        found[at:at] = data.draw(st.binary(min_size=1, max_size=64) | st.just(bytes(600)))
    elif kind == "repeat":
        found[at:at] = found[max(0, at - data.draw(st.integers(1, 3000))) : at]
    else:
        for _ in range(data.draw(st.integers(1, 3))):
            found[data.draw(st.integers(0, len(found) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    assume(bytes(found) != content)  # a bit flipped twice, or a repeat of nothing
    return bytes(found)


def change_text(content: bytes, data: st.DataObject) -> bytes:
    """Change a JSON file by a value or by bytes, or nest it deeply."""
    kind = data.draw(st.sampled_from(["values", "values", "values", "bytes", "deep", "digits"]))
    if kind == "bytes":
        return change_bytes(content, data)
    if kind == "deep":
        return b"[" * 20_000
    if kind == "digits":
        return b'{"step": ' + b"9" * 10_000 + b"}"
    value = json.loads(content)
    change_json(value, data)
    return json.dumps(value).encode()
