from dataclasses import dataclass, field
from pathlib import Path

import pytest

from perf_vit.config import config_value, dump_config, find_config, load_config, shipped_configs
from perf_vit.errors import ConfigError


@dataclass(kw_only=True)
class Tiler:
    size: int = 256
    scale: tuple[float, float] = (1.0, 1.0)


@dataclass(kw_only=True)
class Run:
    out: str
    tiler: Tiler = field(default_factory=Tiler)
    extra: dict[str, int] = field(default_factory=dict)
    region: list[int] | None = None
    more: list[Tiler] | None = None


@pytest.fixture
def write(tmp_path: Path):
    def _write(text: str, name: str = "run.yaml") -> Path:
        path = tmp_path / name
        path.write_text(text)
        return path

    return _write


def test_values_land_on_nested_dataclasses(write) -> None:
    run = load_config(write("out: here\ntiler: {size: 128, scale: [0.5, 2]}\n"), Run)
    assert run == Run(out="here", tiler=Tiler(size=128, scale=(0.5, 2.0)))
    assert isinstance(run.tiler, Tiler)


def test_overrides_win_and_are_parsed_as_yaml(write) -> None:
    run = load_config(write("out: here\n"), Run, ["tiler.size=64", "region=[0,1,2,3]", "extra.anything=1"])
    assert (run.tiler.size, run.region, run.extra) == (64, [0, 1, 2, 3], {"anything": 1})


def test_extends_is_loaded_first(write) -> None:
    write("out: base\ntiler: {size: 32}\n", "base.yaml")
    run = load_config(write("extends: base.yaml\nout: child\n"), Run)
    assert (run.out, run.tiler.size) == ("child", 32)


def test_a_config_that_extends_itself_is_an_error(write) -> None:
    with pytest.raises(ConfigError, match="extends itself"):
        load_config(write("extends: run.yaml\nout: x\n"), Run)


@pytest.mark.parametrize(
    ("text", "overrides", "message"),
    [
        ("out: x\ntiler: {sizee: 3}", [], "Key 'sizee' not in 'tiler'. Did you mean: 'size'?"),
        ("out: x\nmore: [{}, {sizee: 3}]", [], "Key 'sizee' not in 'more[1]'. Did you mean: 'size'?"),
        ("out: x\nmore: {sizee: 3}", [], "Key 'sizee' not in 'more[0]'. Did you mean: 'size'?"),
        ("out: x\nmore: [{}, {size: 3}]", ["more[1].sizee=3"], "Key 'sizee' not in 'more[1]'. Did you mean: 'size'?"),
        ("out: x\nmore: [{}, {size: big}]", [], "more[1].size must be a whole number, got 'big'"),
        ("out: x", ["tilr.size=3"], "Key 'tilr' not in the config. Did you mean: 'tiler'?"),
        ("out: x", ["tiler.size=big"], "tiler.size must be a whole number, got 'big'"),
        ("tiler: {}", [], "give out=..."),
        ("out: x", ["tiler.size"], "overrides must be key=value, got 'tiler.size'"),
        ("- a list", [], "must hold a mapping"),
        ("out: [", [], "is not valid YAML"),
        ("out: x\nextra: {a: 2024-13-45}", [], "extra must be a mapping"),
        ("out: " + "[" * 3000 + "]" * 3000, [], "is not valid YAML"),
    ],
)
def test_errors_name_the_key_in_one_line(write, text: str, overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_config(write(text), Run, overrides)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "read", [lambda *args: load_config(*args), lambda path, _, keys: config_value(path, "out", keys)]
)
def test_a_list_where_an_override_sets_a_key_is_one_line(write, read) -> None:
    with pytest.raises(ConfigError, match=r"run\.yaml: tiler must be a mapping to set tiler\.size, got \[\[\]\]"):
        read(write("out: x\ntiler: [[]]"), Run, ["tiler.size=3"])


def test_a_missing_file_names_the_nearest_shipped_config() -> None:
    with pytest.raises(ConfigError, match=r"did you mean configs/segmentation/buildings\.yaml"):
        find_config("configs/segmentation/building.yaml")


def test_shipped_configs_are_found_from_any_folder(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in shipped_configs():
        assert find_config(name) == find_config(name.removeprefix("configs/"))
    assert "configs/segmentation/buildings.yaml" in shipped_configs()


def test_a_dumped_config_loads_to_the_same_value(write, tmp_path: Path) -> None:
    run = load_config(write("out: here\n"), Run, ["tiler.scale=[0.5,1.5]"])
    dump_config(run, tmp_path / "dumped.yaml")
    assert load_config(tmp_path / "dumped.yaml", Run) == run
