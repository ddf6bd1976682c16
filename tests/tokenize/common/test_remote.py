"""Datasets behind a URL: the same bytes as on the disk, a bounded cache, and clear errors."""

import os
import pickle
import threading
from collections.abc import Callable, Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest

from codecssl.tokenize.common import remote as module
from codecssl.tokenize.common.errors import TransientError, UserError
from codecssl.tokenize.common.remote import RemoteFolder, shrink
from codecssl.tokenize.shards import Shards


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CODECSSL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(module, "BLOCK_BYTES", 1000)  # many blocks of a small file
    return tmp_path / "cache"


@pytest.fixture
def shards(tmp_path: Path, write_learnable: Callable[[Path, int], None]) -> Path:
    write_learnable(tmp_path / "shards", 30)
    return tmp_path / "shards"


@pytest.fixture
def in_memory() -> Iterator[Callable[[Path, str], str]]:
    """in_memory(folder, name): copy a folder to fsspec's memory, and return its URL."""
    memory = fsspec.filesystem("memory")

    def put(folder: Path, name: str) -> str:
        for path in folder.rglob("*"):
            if path.is_file():
                memory.pipe_file(f"/{name}/{path.relative_to(folder).as_posix()}", path.read_bytes())
        return f"memory://{name}"

    yield put
    memory.store.clear()


class Server(SimpleHTTPRequestHandler):
    """An HTTP server that counts requests. `ranges`: answer them with the bytes asked for, as file servers do."""

    ranges, broken = True, 0
    requests: "list[str]" = []  # noqa: RUF012

    def log_message(self, format: str, *arguments: Any) -> None:
        pass

    def do_GET(self) -> None:
        asked = self.headers.get("Range")
        self.requests.append(f"{self.path} {asked}")
        if type(self).broken:
            type(self).broken -= 1
            self.send_error(503)
            return
        if not asked or not self.ranges:
            super().do_GET()
            return
        content = Path(self.translate_path(self.path)).read_bytes()
        first, last = (int(text) for text in asked.removeprefix("bytes=").split("-"))
        part = content[first : last + 1]
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {first}-{first + len(part) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(part)))
        self.end_headers()
        self.wfile.write(part)


@pytest.fixture
def served(shards: Path) -> Iterator[tuple[str, type[Server]]]:
    """The URL of `shards` on a local server, and its handler."""

    class Handler(Server):
        requests: "list[str]" = []  # noqa: RUF012

        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, directory=str(shards.parent), **options)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/shards", Handler
    server.shutdown()
    server.server_close()


def same(local: Shards, remote: Shards) -> bool:
    everything = range(len(local))
    whole = all(np.array_equal(local.codes(i), remote.codes(i)) for i in everything)
    middle = all(np.array_equal(local.codes(i, start=3, stop=9), remote.codes(i, start=3, stop=9)) for i in everything)
    rows = [[(u.id, u.samples, u.labels) for u in each.utterances()] for each in (local, remote)]
    return whole and middle and rows[0] == rows[1] and local.fingerprint == remote.fingerprint


def test_memory_and_disk_hold_the_same_bytes(cache: Path, shards: Path, in_memory: Callable[[Path, str], str]) -> None:
    url = in_memory(shards, "bucket/shards")
    remote = Shards(url, remote=True)
    assert same(Shards(shards), remote)
    assert same(remote, pickle.loads(pickle.dumps(remote)))
    fsspec.filesystem("memory").rm("/bucket/shards/shards", recursive=True)
    assert same(Shards(shards), remote), "every block must be in the cache"


def test_http_requests_each_block_once(cache: Path, shards: Path, served: tuple[str, type[Server]]) -> None:
    url, server = served
    assert same(Shards(shards), Shards(url, remote=True))
    asked = [request for request in server.requests if "bytes=" in request]
    size = (shards / "shards" / "00000.tar").stat().st_size
    assert 2 < len(set(asked)) <= -(-size // 1000)
    assert len(asked) == len(set(asked))
    server.requests.clear()
    assert same(Shards(shards), Shards(url, remote=True))
    assert not [request for request in server.requests if "bytes=" in request], "the second start must read the cache"


def test_a_url_is_refused_where_the_user_did_not_give_it(shards: Path, in_memory: Callable[[Path, str], str]) -> None:
    with pytest.raises(UserError, match="memory://bucket: is a URL; only --data of codecssl-pretrain run"):
        Shards(in_memory(shards, "bucket"))


def test_new_content_at_the_same_url_never_meets_old_blocks(
    cache: Path, shards: Path, tmp_path: Path, in_memory: Callable[[Path, str], str],
    write_learnable: Callable[[Path, int], None],
) -> None:  # fmt: skip
    url = in_memory(shards, "bucket")
    assert same(Shards(shards), Shards(url, remote=True))
    write_learnable(tmp_path / "other", 25)
    in_memory(tmp_path / "other", "bucket")
    assert same(Shards(tmp_path / "other"), Shards(url, remote=True))


@pytest.mark.parametrize("harm", ["flip", "cut"])
def test_a_damaged_block_of_the_cache_is_fetched_again(
    cache: Path, shards: Path, in_memory: Callable[[Path, str], str], harm: str
) -> None:
    url = in_memory(shards, "bucket")
    assert same(Shards(shards), Shards(url, remote=True))
    for path in cache.rglob("0000*"):
        if path.is_file():
            content = np.frombuffer(path.read_bytes(), np.uint8)
            path.write_bytes((content ^ 1 if harm == "flip" else content[:-1]).tobytes())
    [place] = Shards(shards).blocks
    remote = Shards(url, remote=True)
    codes = remote.codes(0)
    assert np.array_equal(codes, Shards(shards).codes(0)), place


def test_a_damaged_source_is_an_error_with_the_url(
    cache: Path, shards: Path, in_memory: Callable[[Path, str], str]
) -> None:
    [place] = Shards(shards).blocks
    tar = shards / "shards" / "00000.tar"
    content = bytearray(tar.read_bytes())
    content[int(place["codes_offset"]) + 7] ^= 1
    tar.write_bytes(bytes(content))
    with pytest.raises(UserError, match="memory://bucket/shards/00000.tar: the codes of utterances 0 to 29"):
        Shards(in_memory(shards, "bucket"), remote=True).codes(0)


def test_the_cache_is_bounded_and_keeps_what_was_used_last(tmp_path: Path) -> None:
    folder = tmp_path / "dataset" / "tar"
    folder.mkdir(parents=True)
    for number in range(20):
        (folder / f"{number:08d}").write_bytes(bytes(1000))
        os.utime(folder / f"{number:08d}", (number, number if number != 3 else 1000))
    shrink(tmp_path, 20_000)
    assert len(list(folder.iterdir())) == 20
    shrink(tmp_path, 10_000)
    kept = sorted(int(path.name) for path in folder.iterdir())
    assert kept == [3, 12, 13, 14, 15, 16, 17, 18, 19]


def test_reading_more_than_the_cache_holds_stays_within_its_bound(
    cache: Path, shards: Path, in_memory: Callable[[Path, str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tar = (shards / "shards" / "00000.tar").stat().st_size
    monkeypatch.setenv("CODECSSL_CACHE_GIB", str(tar / 2 / (1 << 30)))
    remote = Shards(in_memory(shards, "bucket"), remote=True)
    for _ in range(2):
        assert same(Shards(shards), remote)
    held = sum(path.stat().st_size for path in cache.glob("shards/*/*/*"))
    assert 0 < held <= tar / 2 * (1 + 1 / 16) + 1000


def test_clear_errors(
    cache: Path, served: tuple[str, type[Server]], monkeypatch: pytest.MonkeyPatch, shards: Path
) -> None:
    url, server = served
    with pytest.raises(UserError, match="nothing/dataset.json: there is no such file"):
        Shards(f"{url}/nothing", remote=True)
    with pytest.raises(UserError, match="nosuch://x: cannot be opened.*Protocol not known: nosuch"):
        Shards("nosuch://x", remote=True)
    monkeypatch.setenv("CODECSSL_CACHE_GIB", "much")
    with pytest.raises(UserError, match="CODECSSL_CACHE_GIB much: must be a number of GiB above 0"):
        Shards(url, remote=True)
    monkeypatch.delenv("CODECSSL_CACHE_GIB")
    server.ranges = False
    with pytest.raises(UserError, match="00000.tar: the server has no byte ranges; copy the folder to a disk"):
        Shards(url, remote=True).codes(0)


def test_a_server_that_fails_is_asked_again_and_then_named(
    cache: Path, served: tuple[str, type[Server]], shards: Path
) -> None:
    url, server = served
    remote = Shards(url, remote=True, retry_seconds=20.0)
    server.broken = 2
    assert np.array_equal(remote.codes(0), Shards(shards).codes(0))
    server.broken = 10_000
    with pytest.raises(TransientError, match=r"tried for 0.3 s"):
        Shards(url, remote=True, retry_seconds=0.3)


def test_a_short_file_is_cut_short(cache: Path, shards: Path, in_memory: Callable[[Path, str], str]) -> None:
    folder = RemoteFolder(in_memory(shards, "bucket"))
    folder.use_cache("x")
    size = folder.size("dataset.json")
    assert folder.read("dataset.json", 2, size - 2) == (shards / "dataset.json").read_bytes()[2:]
    with pytest.raises(ValueError, match="cut short"):
        folder.read("dataset.json", 2, size)


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A local S3 server, to which AWS's variables point, with an empty bucket `tokens`; fsspec's file system of it."""
    server_module = pytest.importorskip(
        "moto.server", reason="needs a local S3 server: pip install -c constraints.txt 'moto[server]'"
    )
    s3fs = pytest.importorskip("s3fs")
    server = server_module.ThreadedMotoServer("127.0.0.1", 0)
    server.start()
    host, port = server.get_host_and_port()
    settings = {"ACCESS_KEY_ID": "key", "SECRET_ACCESS_KEY": "secret", "DEFAULT_REGION": "us-east-1"}
    for name, value in (settings | {"ENDPOINT_URL": f"http://{host}:{port}"}).items():
        monkeypatch.setenv(f"AWS_{name}", value)
    s3fs.S3FileSystem.clear_instance_cache()
    system = fsspec.filesystem("s3")
    system.mkdir("tokens")
    yield system
    system.rm("tokens", recursive=True)
    s3fs.S3FileSystem.clear_instance_cache()
    server.stop()


def test_s3_and_disk_hold_the_same_bytes(cache: Path, shards: Path, bucket: Any) -> None:
    bucket.put(str(shards), "tokens/", recursive=True)
    remote = Shards("s3://tokens/shards", remote=True)
    assert same(Shards(shards), remote)
    assert same(remote, pickle.loads(pickle.dumps(remote)))
    bucket.rm("tokens/shards/shards", recursive=True)
    assert same(Shards(shards), remote), "every block must be in the cache"


def test_errors_of_s3_are_lines(cache: Path, bucket: Any) -> None:
    with pytest.raises(
        UserError, match=r"s3://tokens/gone/dataset\.json: there is no such file, or no right to see it"
    ):
        Shards("s3://tokens/gone", remote=True)
    with pytest.raises(UserError, match=r"s3://nowhere/corpus/dataset\.json: there is no such file"):
        Shards("s3://nowhere/corpus", remote=True)


def test_gs_without_its_package_names_it(cache: Path) -> None:
    try:
        import gcsfs  # noqa: F401
    except ImportError:
        with pytest.raises(UserError, match=r"gs://bucket/shards: cannot be opened .*gcsfs") as error:
            Shards("gs://bucket/shards", remote=True)
        assert "\n" not in str(error.value)
    else:
        pytest.skip("gcsfs is installed")
