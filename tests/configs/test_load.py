from dataclasses import dataclass, field
from pathlib import Path

import pytest
import yaml

from codecssl.configs.load import (
    config_path,
    differences,
    from_dict,
    load_config,
    names,
    to_yaml,
)
from codecssl.tokenize.common.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Inner:
    width: int = 4
    rate: float = 0.5
    tags: tuple[str, ...] = ()
    most: int | None = None


@dataclass(frozen=True, kw_only=True)
class Outer:
    seed: int = 1
    inner: Inner = field(default_factory=Inner)


@pytest.fixture
def file(tmp_path: Path) -> str:
    path = tmp_path / "some.yaml"
    path.write_text("inner:\n  width: 8\n  rate: 0.25\n")
    return str(path)


def test_command_line_beats_file_beats_default(file: str) -> None:
    config = load_config(
        Outer, "pretrain", file, ["--inner.rate=1e-3", "--inner.tags", "[a, b c]", "--inner.most", "3"]
    )
    assert config == Outer(inner=Inner(width=8, rate=0.001, tags=("a", "b c"), most=3))


def test_yaml_round_trip(file: str) -> None:
    config = load_config(Outer, "pretrain", file, ["--inner.tags=[x]", "--seed", "7"])
    assert from_dict(Outer, yaml.safe_load(to_yaml(config))) == config


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["--inner.widht", "3"], "unknown key 'inner.widht'; did you mean 'inner.width'?"),
        (["--iner.width=3"], "unknown key 'iner'; did you mean 'inner'?"),
        (["--inner=3"], "'inner' is a section"),
        (["--inner.width=wide"], "inner.width"),
        (["--inner.width"], "has no value"),
        (["--inner.width", "--seed=3"], "override --inner.width: has no value"),
        (["width=3"], "overrides are --section.key value"),
    ],
)
def test_user_errors_are_one_line(file: str, overrides: list[str], message: str) -> None:
    with pytest.raises(UserError) as error:
        load_config(Outer, "pretrain", file, overrides)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_unknown_key_in_the_file(tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text("inner:\n  rat: 1\n")
    with pytest.raises(UserError, match=r"bad\.yaml: unknown key 'inner\.rat'; did you mean 'inner\.rate'"):
        load_config(Outer, "pretrain", str(path))
    path.write_text("inner: [1\n")
    with pytest.raises(UserError, match="not YAML"):
        load_config(Outer, "pretrain", str(path))


def test_unknown_config_name_suggests_one() -> None:
    with pytest.raises(UserError, match="did you mean 'codec2vec_tiny_codes'"):
        config_path("pretrain", "codec2vec_tny_codes")


def test_a_lone_value_on_the_command_line_is_a_list_of_one(file: str) -> None:
    assert load_config(Outer, "pretrain", file, ["--inner.tags", "one"]).inner.tags == ("one",)
    assert load_config(Outer, "pretrain", file, ["--inner.tags=[one, two]"]).inner.tags == ("one", "two")


def test_overrides_of_one_section_are_merged(file: str) -> None:
    overrides = ["--inner.tags", "a, b", "--inner.most=3", "--inner.most", "null", "--seed", "7"]
    assert load_config(Outer, "pretrain", file, overrides) == Outer(
        seed=7, inner=Inner(width=8, rate=0.25, tags=("a, b",), most=None)
    )


def test_differences_name_the_dotted_key() -> None:
    assert differences(Outer(), Outer(inner=Inner(width=5))) == {"inner.width": (4, 5)}


def test_every_shipped_pretrain_config_loads() -> None:
    from codecssl.pretrain.config import RunConfig

    shipped = names("pretrain")
    assert {f"codec2vec_{size}_codes" for size in ("tiny", "laptop", "small", "base", "large")} <= set(shipped)
    for name in shipped:
        load_config(RunConfig, "pretrain", name)
