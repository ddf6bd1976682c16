"""Parsing of upstream names."""

from pathlib import Path

import pytest

from codecssl.superb.rows import SPECTRA
from codecssl.superb.upstreams.build import BUILD_SPECTRA
from codecssl.superb.upstreams.names import parse, parse_all
from codecssl.tokenize.common.errors import UserError


def test_every_spectral_baseline_has_a_constructor() -> None:
    assert tuple(BUILD_SPECTRA) == SPECTRA == tuple(parse(name).kind for name in SPECTRA)


@pytest.mark.parametrize("name", ["hubert_basse", "random:nowhere", "nowhere/model", "fbank:x"])
def test_an_unknown_name_is_refused(name: str) -> None:
    with pytest.raises(UserError, match=f"upstream {name}: not known; give"):
        parse(name)


def test_a_codec_in_the_hubs_format_is_not_taken_for_a_model(tmp_path: Path) -> None:
    """A codec's folder also has a config.json. The identity depends on the contents of its files."""
    (tmp_path / "config.json").write_text('{"model_type": "encodec"}')
    upstream = parse(f"codes:encodec_24khz@{tmp_path}")
    first = upstream.identity()["sha256"]
    (tmp_path / "config.json").write_text('{"model_type": "dac"}')
    assert first is not None
    assert upstream.identity()["sha256"] != first
    assert parse("codes:tiny_16khz").identity()["sha256"] is None
    with pytest.raises(UserError, match="not known"):
        parse(str(tmp_path))


def test_bare_baselines_follow_the_first_model(model_folder: Path) -> None:
    """`codes` and `random` share the codec and the architecture of the model in the same comparison."""
    named = parse_all(["fbank", "codes", str(model_folder), "random", "codes:tiny_16khz"])
    assert [u.argument for u in named] == [
        None,
        str(model_folder),
        str(model_folder),
        str(model_folder),
        "tiny_16khz",
    ]
    assert parse_all(["codes"])[0].argument is None
