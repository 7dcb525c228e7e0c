"""Two processes train as one does on the same global batch."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from perf_vit.data import make_ship_scene
from perf_vit.models import load_segmenter

SCRIPT = '''
import json, os, sys
from pathlib import Path
import lightning, torch
from perf_vit.data import AugmentConfig, SegmentationDataConfig, SegmentationSplitConfig, build_segmentation_datamodule
from perf_vit.models import SegmentationModelConfig, SegmentationSpec
from perf_vit.tasks import SegmentationOptimConfig, SegmentationTask, TrainerConfig, build_trainer

image, labels, folder, devices, strategy, kill_at = sys.argv[1:]


class Losses(lightning.Callback):
    """The mean over all processes of the loss of each step."""

    def __init__(self):
        self.values = []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        loss = outputs["loss"].detach()
        self.values.append(trainer.strategy.reduce(loss, reduce_op="mean").item())
        if trainer.is_global_zero:
            with open(f"{folder}/losses.json", "w") as file:
                json.dump(self.values, file)
        if len(self.values) == int(kill_at):
            os._exit(9)


def main():
    torch.set_num_threads(1)
    torch.manual_seed(0)
    region = SegmentationSplitConfig(image=image, labels=labels, region=[8, 24, 100, 100])
    count = int(devices)
    config = SegmentationDataConfig(train=region, val=region, classes=["sea", "ship"], background="sea", tile_px=64,
                        tiles_per_epoch=40, batch_size=4 // count, augment=AugmentConfig(flips=True))
    data = build_segmentation_datamodule(config, seed=0)
    spec = SegmentationSpec(classes=data.classes, normalizer=data.normalizer, tile_px=data.tile_px)
    model = SegmentationModelConfig(backbone="performer_vit_tiny_patch16_224", out_indices=[0, 1],
                        head_kwargs={"norm": "group"},
                        backbone_kwargs={"depth": 2, "attn_kwargs": {"num_features": 32}})
    task = SegmentationTask(model, spec, SegmentationOptimConfig())
    trainer = build_trainer(TrainerConfig(accelerator="cpu", devices=devices, max_epochs=2,
                                          strategy=strategy), Path(folder), progress=False)
    trainer.callbacks.append(Losses())
    last = Path(folder, "checkpoints", "last.ckpt")
    trainer.fit(task, data, ckpt_path=last if last.exists() else None, weights_only=True)


if __name__ == "__main__":
    main()
'''


def _losses(scene, folder: Path, devices: int, strategy: str, kill_at: int = 0) -> np.ndarray:
    folder.mkdir(exist_ok=True)
    script = folder / "train.py"
    script.write_text(SCRIPT)
    command = [sys.executable, script, scene.image, scene.labels, folder, devices, strategy, kill_at]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    assert (done.returncode == 0) == (kill_at == 0), done.stderr[-3000:]
    return np.array(json.loads((folder / "losses.json").read_text()))


@pytest.mark.slow
def test_two_processes_have_the_losses_of_one(tmp_path) -> None:
    scene = make_ship_scene(tmp_path / "scene", seed=1, size_px=160, num_targets=12)
    one = _losses(scene, tmp_path / "one", 1, "auto")
    assert np.ptp(one) > 0.1
    losses = {}
    for strategy in ("ddp_spawn", "fsdp2"):
        two = _losses(scene, tmp_path / strategy, 2, strategy)
        assert len(one) == len(two) == 20
        np.testing.assert_allclose(two, one, rtol=0, atol=1e-5)
        losses[strategy] = two
    # A checkpoint of shared out weights is one file that loads as any other.
    shared, alone = (load_segmenter(tmp_path / name / "checkpoints" / "last.ckpt") for name in ("fsdp2", "one"))
    for name, value in alone.state_dict().items():
        torch.testing.assert_close(shared.state_dict()[name], value, rtol=0, atol=2e-3)
    # Killed in the second epoch, it goes on from the end of the first.
    before = _losses(scene, tmp_path / "killed", 2, "fsdp2", kill_at=13)
    after = _losses(scene, tmp_path / "killed", 2, "fsdp2")
    np.testing.assert_array_equal(before, losses["fsdp2"][:13])
    np.testing.assert_array_equal(after, losses["fsdp2"][10:])
