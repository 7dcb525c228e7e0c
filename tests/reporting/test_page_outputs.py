"""Pages of predictions."""

import re

import numpy as np
from pages import parsed

from perf_vit.reporting.outputs import write_map_report, write_table_report
from perf_vit.sources import open_source
from perf_vit.writers import CogWriter, RasterLayout


def test_classes_that_overlap_are_counted_each_with_one_threshold_for_all_parts(make_scene, tmp_path) -> None:
    source = open_source(make_scene(height=64, width=1100))
    probabilities = np.ones((2, 64, 1100), "uint8")
    # Left of it, no probability is larger than 1/254.
    probabilities[:, 32:, 880:] = 200
    probabilities[1, :32, 880:] = 128
    layout = {"height": 64, "width": 1100, "num_bands": 2, "dtype": "uint8", "nodata": 255, "scale": 1 / 254}
    with CogWriter(tmp_path / "p.tif", RasterLayout(crs=source.crs, transform=source.transform, **layout)) as writer:
        writer.write(0, probabilities)
    out = tmp_path / "p.html"
    write_map_report(out, source, tmp_path / "p.tif", ["wet", "built"], multilabel=True, scale=1 / 254, settings={})
    shares = dict(re.findall(r"(none|wet|built)\W*([01]\.\d{3})", parsed(out).text))
    assert shares == {"none": "0.800", "built": "0.200", "wet": "0.100"}


def test_a_class_may_be_called_as_any_column_is(tmp_path) -> None:
    table = tmp_path / "t.csv"
    rows = ["image,prediction,error,prediction,error", "a.png,error,0.75,0.25,", "b.png,prediction,0.375,0.625,"]
    table.write_text("\n".join([*rows, "c.png,,,,no such file: c.png"]) + "\n")
    picture = np.zeros((8, 8, 3), np.uint8)
    write_table_report(
        tmp_path / "t.html",
        table,
        lambda _: lambda: {"image": picture},
        columns=["image", "prediction", "error", "prediction"],
        column="prediction",
        settings={},
    )
    found = parsed(tmp_path / "t.html")
    assert found.captions == ["a.png: error, 0.75", "b.png: prediction, 0.62"]
    assert "2 of 3 inputs" in found.text


def test_each_class_of_several_is_counted_by_its_name(tmp_path) -> None:
    rows = [["a.png", "open sea;ice", "1", "1"], ["b.png", "open sea", "1", "0"], ["c.png", "", "0", "0"]]
    table = tmp_path / "found.csv"
    columns = ["image", "predictions", "open sea", "ice"]
    table.write_text("\n".join(",".join(row) for row in [columns, *rows]))
    options = {"columns": columns, "column": "predictions", "settings": {}}
    picture = np.zeros((8, 8, 3), np.uint8)
    write_table_report(tmp_path / "found.html", table, lambda _: lambda: {"image": picture}, **options)
    counts = re.findall(r'<th scope="row">([^<]+)</th><td[^>]*>([12])</td>', (tmp_path / "found.html").read_text())
    assert counts == [("open sea", "2"), ("ice", "1"), ("none", "1")]
    assert parsed(tmp_path / "found.html").captions == ["a.png: open sea, ice", "b.png: open sea, 1.00", "c.png: none"]
