"""Rows of the JSON files that superb reads and writes, and the kinds of upstreams that they name."""

from typing import Any

ManifestRow = dict[str, Any]
"""An utterance of manifest.jsonl with its labels; sample_corpus.md lists the columns."""
ResultRow = dict[str, Any]
"""A finished run or probe, as in results.jsonl."""
TrialLine = tuple[int, str, str]
"""A line of a trial list of speaker verification: 1 for the same speaker, else 0, and the two files."""

SPECTRA = ("fbank", "logmel", "mfcc")
"""Kinds of upstreams that compute spectra of the wave; each has its constructor in upstreams/build.py."""
BASELINES = (*SPECTRA, "codes", "random")
"""Kinds of upstreams to which the others are compared, in the order of the tables."""
