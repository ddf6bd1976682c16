"""Weights that a card names: the user's own paths and downloads are used, a stranger's are not."""

import dataclasses
import os
import shutil

import pytest

from codecssl.tokenize.backends.parts import weights
from codecssl.tokenize.cli import main
from codecssl.tokenize.codec import CodecCard
from codecssl.tokenize.common.errors import UserError
from codecssl.tokenize.format.layout import load_json, sealed
from codecssl.tokenize.format.writer import to_json
from codecssl.tokenize.registry import load_codec, load_codec_for, named_source


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A user who has named nothing yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "codecssl"


def card_of(path) -> CodecCard:
    """A stranger's card: it names this path or URL."""
    return dataclasses.replace(load_codec("tiny_16khz").card, weights=str(path))


@pytest.mark.parametrize("scheme", ["{}", "file://{}", "tiny_16khz@{}", "tiny_16khz@file://{}"])
def test_a_path_or_url_that_only_the_card_names_is_not_read(scheme, codec_file, cache):
    card = card_of(scheme.format(codec_file))
    for use in (load_codec_for, named_source):
        with pytest.raises(UserError, match="names its weights by .*, which you have not given") as error:
            use(card)
        assert "\n" not in str(error.value)
    assert not cache.exists()


def test_addresses_in_a_card_are_not_contacted(monkeypatch):
    monkeypatch.setattr("urllib.request.urlopen", lambda *_, **__: pytest.fail("asked"))
    with pytest.raises(UserError, match="have not given"):
        load_codec_for(card_of("http://127.0.0.1:9/weights.th"))


def test_weights_named_only_by_a_card_are_not_downloaded(monkeypatch):
    asked = []
    monkeypatch.setattr("huggingface_hub.model_info", lambda repository, timeout: asked.append(repository))
    card = dataclasses.replace(card_of("someone/evil"), name="mimi")
    with pytest.raises(UserError, match="codec mimi: no weights at someone/evil"):
        load_codec_for(card)
    assert asked == []


def test_a_path_that_the_user_gave_once_is_known_until_it_changes(codec_file, tmp_path):
    path = tmp_path / "mine.safetensors"
    shutil.copy(codec_file, path)
    card = load_codec(str(path)).card
    assert load_codec_for(card).card == card
    assert load_codec_for(dataclasses.replace(card, weights=f"tiny_16khz@{path}")).card.weights_sha256
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match="or which changed since"):
        load_codec_for(card)
    shutil.copy(codec_file, path)
    os.utime(path)
    assert load_codec_for(card).card == card


def test_weights_given_by_the_user_are_used_and_remembered(codec_file):
    card = load_codec("tiny_16khz").card
    theirs = dataclasses.replace(load_codec(str(codec_file)).card, weights="/nowhere/moved.safetensors")
    assert load_codec_for(theirs, weights=str(codec_file)).card.weights_sha256 == theirs.weights_sha256
    with pytest.raises(UserError, match="was written with"):
        load_codec_for(card, weights=str(codec_file))


def test_an_unwritable_home_is_not_an_error(codec_file, cache):
    cache.parent.mkdir()
    cache.write_text("a file where the folder should be")
    assert load_codec(str(codec_file)).card.weights == str(codec_file)


def test_a_download_is_the_users_own_and_has_a_limit(codec_file, monkeypatch, cache):
    url = codec_file.as_uri()
    monkeypatch.setattr(weights, "MOST_BYTES", codec_file.stat().st_size - 1)
    with pytest.raises(UserError, match="more than .* GiB; fetch it by hand"):
        load_codec(f"tiny_16khz@{url}")
    assert not [p for p in cache.rglob("*") if p.is_file()]
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache.parent))
    card = load_codec(f"tiny_16khz@{url}").card
    assert load_codec_for(card).card == card
    assert load_codec_for(dataclasses.replace(card, weights=url)).card == card, "the file must be in the cache"


@pytest.mark.parametrize("weights", ["file:///etc/passwd", "http://127.0.0.1:9/x", "/etc/passwd"])
def test_no_command_reads_files_named_by_a_dataset(weights, tmp_path, capsys, cache):
    import numpy as np

    from codecssl.tokenize.write_codes import write_shards

    root = tmp_path / "d"
    card = load_codec("tiny_16khz").card
    write_shards(root, card, [("a", np.zeros((8, 5), np.uint16), {})])
    header = load_json(root / "dataset.json")
    header["codec"]["weights"] = weights
    (root / "dataset.json").write_bytes(to_json(sealed(header)))
    assert main(["decode", str(root), "--id", "a", "-o", str(tmp_path / "a.wav")]) == 1
    assert "which you have not given" in capsys.readouterr().err
    assert main(["verify", str(root)]) == 0
    assert not cache.exists()


def test_codecs_loads_one_and_remembers_it(codec_file, capsys):
    assert main(["codecs", f"tiny_16khz@{codec_file}"]) == 0
    assert '"name": "tiny_16khz"' in capsys.readouterr().out
    assert load_codec_for(load_codec(str(codec_file)).card)
