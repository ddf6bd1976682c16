"""The structure of the project: imports, layers, wheel, declared packages."""

import ast
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import packages_distributions
from pathlib import Path

import numpy as np
import pytest
import soundfile

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
STAGES = ("tokenize", "pretrain", "superb", "configs", "slurm")


@pytest.mark.parametrize("folder", [*STAGES, "tests"])
def test_no_stage_shadows_the_standard_library(folder):
    """A top-level `tokenize` package, or a `queue.py` on sys.path, breaks `import torch` in that folder."""
    assert not list((ROOT / folder).rglob("__init__.py"))
    if folder in STAGES:
        sources = list((ROOT / folder).rglob("*.py"))
        names = {p.stem for p in sources} | {p.parent.name for p in sources if p.parent != ROOT / folder}
        assert not names & set(sys.stdlib_module_names)


def test_folders_and_files_are_small():
    """A folder has at most 15 source files, a file at most 400 lines."""
    for stage in STAGES:
        for folder in {path.parent for path in (ROOT / stage).rglob("*.py")}:
            files = sorted(folder.glob("*.py"))
            assert len(files) <= 15, f"{folder} has {len(files)} source files"
            for path in files:
                assert len(path.read_text().splitlines()) <= 400, f"{path} is longer than 400 lines"


def test_imports_follow_the_layers_and_have_no_cycle(tmp_path):
    """The contracts of import-linter in pyproject.toml."""
    for stage in STAGES:
        shutil.copytree(ROOT / stage, tmp_path / "codecssl" / stage, ignore=shutil.ignore_patterns("__pycache__"))
    for folder in [tmp_path / "codecssl", *{path.parent for path in (tmp_path / "codecssl").rglob("*.py")}]:
        (folder / "__init__.py").touch()
    command = [Path(sys.executable).with_name("lint-imports"), ROOT / "pyproject.toml", "--no-cache"]
    done = subprocess.run(
        command, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(tmp_path)}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Contracts: 5 kept, 0 broken" in done.stdout


OPTIONAL = {
    "ai_edge_litert": "ai-edge-litert",
    "flashlight": "flashlight-text",
    "kenlm": "kenlm",
    "mteb": "mteb",
    "snac": "snac",
}
"""Packages of the extras, which may be missing here."""


def test_every_imported_package_is_declared():
    """A package installed only as a dependency of another may disappear with the next release of the latter."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = [*project["dependencies"], *(line for extra in project["optional-dependencies"].values() for line in extra)]
    declared = {_normalized(re.match(r"[\w.-]+", line)[0]) for line in lines}
    providers = packages_distributions()
    for stage in STAGES:
        for path in (ROOT / stage).rglob("*.py"):
            for module in _imported(path) - set(sys.stdlib_module_names) - {"codecssl"}:
                names = {_normalized(name) for name in providers.get(module, [OPTIONAL.get(module, module)])}
                assert names & declared, f"{path} imports {module}; add {sorted(names)} to pyproject.toml"


def _imported(path):
    nodes = list(ast.walk(ast.parse(path.read_text())))
    modules = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    modules += [node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module]
    return {module.partition(".")[0] for module in modules}


def _normalized(name):
    return re.sub(r"[-_.]+", "-", name).lower()


def test_a_script_at_the_root_still_finds_the_standard_librarys_tokenize():
    code = "import tokenize, torch; print(tokenize.open.__module__)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "tokenize", done.stderr


def test_no_file_names_a_registry():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    for name in listed.stdout.split():
        path = ROOT / name
        if path.suffix in (".tar", ".safetensors") or not path.is_file():
            continue
        text = path.read_text(errors="replace")
        for host in ("pypi" + ".org", "pythonhosted" + ".org", "--index" + "-url", "index" + "_url"):
            assert host not in text, f"{name} names {host}"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    if missing := [name for name in ("pip", "setuptools", "wheel") if importlib.util.find_spec(name) is None]:
        pytest.skip(f"no build backend: {' and '.join(missing)} not installed")
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(source)], check=True)
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(folder),
        ".",
    ]
    subprocess.run(command, cwd=source, check=True, capture_output=True, timeout=300)
    [path] = folder.glob("*.whl")
    return path


def test_every_folder_with_sources_is_a_listed_package():
    """A wheel lacks folders that are not listed. A listed folder that does not exist breaks the build."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = {path.parent.relative_to(ROOT) for stage in STAGES for path in (ROOT / stage).rglob("*.py")}
    assert set(settings["packages"]) == {"codecssl." + ".".join(folder.parts) for folder in folders}


def test_a_regular_install_holds_every_tracked_file_of_the_stages(wheel):
    """An editable install reads the checkout and does not show files that the wheel lacks."""
    inside = set(zipfile.ZipFile(wheel).namelist())
    tracked = subprocess.run(["git", "ls-files", *STAGES], cwd=ROOT, capture_output=True, text=True, check=True)
    missing = [name for name in tracked.stdout.split() if f"codecssl/{name}" not in inside]
    assert not missing


def test_a_regular_install_runs(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path)
    code = (
        "import codecssl.tokenize.cli as c, codecssl.pretrain.cli, codecssl.superb.cli, codecssl.configs.load as l;"
        "from codecssl.tokenize.registry import load_codec; from codecssl.superb.sample.unpack import ARCHIVE;"
        "print(c.__file__, load_codec('tiny_16khz').card.num_codebooks, ARCHIVE.is_file(),"
        "'encodecmae_base' in l.names('pretrain'))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={"PYTHONPATH": str(tmp_path), "PATH": ""},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert str(tmp_path) in done.stdout
    assert "8 True True" in done.stdout


ORIGINS = """
import pickle, sys
from contextlib import closing
from codecssl.superb.runner.jobs import _attempt_all
from codecssl.superb.runner.workers import in_workers
from codecssl.tokenize.config import TokenizeConfig

def origins(value):
    yield [module.__file__ for name, module in sys.modules.items() if name.startswith("codecssl.") and module.__file__]

if __name__ == "__main__":
    sent = [(_attempt_all, TokenizeConfig(sources=("a",), output="b"))]
    with closing(in_workers(origins, sent, 1)) as outcomes:
        for _, files in outcomes:
            print(*files, sep="\\n")
"""


def test_spawned_workers_of_a_regular_install_find_its_modules(wheel, tmp_path):
    """Workers unpickle functions and settings by module name; encode, and write the same shards as one process."""
    site, script = tmp_path / "site", tmp_path / "origins.py"
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(site), str(wheel)]
    subprocess.run(install, check=True, capture_output=True, timeout=300)
    environment = os.environ | {"PYTHONPATH": str(site)}

    def run(*words):
        done = subprocess.run(
            [sys.executable, *words], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    script.write_text(ORIGINS)
    files = run(str(script)).split()
    assert len(files) > 20
    assert all(name.startswith(str(site)) for name in files)
    (tmp_path / "audio").mkdir()
    for i in range(4):
        soundfile.write(tmp_path / f"audio/{i}.wav", np.random.default_rng(i).normal(0, 0.1, 8000), 16_000)
    for workers in ("0", "2"):
        options = ("--codec", "tiny_16khz", "--workers", workers, "--output", f"shards{workers}")
        run("-m", "codecssl.tokenize", "run", "audio", *options)
    alone, shared = (tmp_path / f"shards{workers}/shards/00000.tar" for workers in ("0", "2"))
    assert alone.read_bytes() == shared.read_bytes()


@pytest.mark.parametrize("command", ["codecssl-tokenize", "codecssl-pretrain", "codecssl-superb"])
def test_help_is_quick_and_usage_errors_exit_2(command):
    """Heavy imports only after parsing: --help must not load torch."""
    module = f"codecssl.{command.partition('-')[2]}.cli"
    code = (
        f"import sys; import {module} as m\n"
        "try: m.main(['--help'])\nexcept SystemExit as e: assert e.code == 0\n"
        "assert 'torch' not in sys.modules, 'torch was imported for --help'\n"
        "try: m.main(['no-such-command'])\nexcept SystemExit as e: sys.exit(e.code)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2, done.stderr
    assert "usage: " + command in done.stdout
