"""The Python block of docs/segmentation.md, run as a reader would."""

from doc_examples import examples, run


def test_the_example_of_folders_gives_batches(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = run(examples("segmentation.md", "Train"))
    assert names["images"].shape == (4, 3, 64, 64)
    assert names["labels"].shape == (4, 64, 64)
    assert sorted(names["labels"].unique().tolist()) == [0, 1]
    assert len(names["data"].val) == 2 * 4
