"""Two processes that redraw from the step counter alone train as one does."""

import multiprocessing
from pathlib import Path

import timm
import torch
import torch.distributed as dist
from torch.multiprocessing import start_processes
from torch.nn.parallel import DistributedDataParallel

import perf_vit  # noqa: F401  (registers the backbones)
from perf_vit.layers import current_draw, redraw_projections

STEPS = 4


def train(rank: int, world_size: int, folder: str) -> None:
    """Train on this rank's half of each batch, redrawing every second step; leave the model in a file."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/{world_size}", rank=rank, world_size=world_size)
    torch.manual_seed(0)
    model = timm.create_model("performer_vit_tiny_patch16_224", img_size=32, num_classes=3, depth=2)
    model.set_grad_checkpointing(True)
    parallel = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(parallel.parameters(), lr=0.1)
    for step in range(STEPS):
        redraw_projections(model, step // 2)
        generator = torch.Generator().manual_seed(step)
        images, labels = torch.randn(4, 3, 32, 32, generator=generator), torch.tensor([0, 1, 2, 1])
        mine = slice(rank * 4 // world_size, (rank + 1) * 4 // world_size)
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(parallel(images[mine]), labels[mine]).backward()
        optimizer.step()
    assert current_draw(model) == (STEPS - 1) // 2
    projections = [module.projection for module in model.modules() if hasattr(module, "projection")]
    torch.save([*model.parameters(), *projections], Path(folder) / f"{world_size}-{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_equal_each_other_and_one(tmp_path: Path) -> None:
    train(0, 1, str(tmp_path))
    # Both processes start from one that has imported everything.
    multiprocessing.set_forkserver_preload(["perf_vit"])
    start_processes(train, (2, str(tmp_path)), nprocs=2, start_method="forkserver")
    one, first, second = (torch.load(tmp_path / f"{name}.pt") for name in ("1-0", "2-0", "2-1"))
    for a, b, c in zip(one, first, second, strict=True):
        assert torch.equal(b, c)
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
