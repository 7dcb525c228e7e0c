"""What maps are trained on, by the command line."""

import pytest
from command_line import call, train_args


@pytest.mark.parametrize("sampler", ["balanced", "grid"])
def test_training_takes_each_sampler(trained, tmp_path, capsys, sampler) -> None:
    args = train_args(trained.scene, tmp_path / "run", f"data.sampler={sampler}", "trainer.max_epochs=1")
    assert call(args) == 0
    assert ("looking for pixels of the classes" in capsys.readouterr().err) == (sampler == "balanced")
    assert f"sampler: {sampler}" in (tmp_path / "run" / "config.yaml").read_text()
