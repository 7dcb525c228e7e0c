"""One of several processes that share an image, as `test_processes` starts them; leaves FOLDER/RANK.pt."""

import os
from pathlib import Path

import torch
import torch.distributed as dist
from streamed_models import MODELS, Image, build_for, holes, streamed

SMALL_SIZE, LARGE_SIZE = (406, 311), (812, 622)
COMPARED = ("performer", "rope", "clustered without sinks", "clustered rope")
"""Models whose traffic is that of both sizes; all others see the small image only."""


def run_stripe(rank: int, folder: str, number: int) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(os.path.join(folder, "store"), number)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=number)
    results = {}
    for name in MODELS:
        for size in (SMALL_SIZE, *([LARGE_SIZE] if name in COMPARED else [])):
            model, _ = build_for(name, *size)
            found, (kept,) = streamed(model, Image(*size, holes(*size)), indices=(1,), part_tokens=60)
            own = found.layout.own_tokens
            results[name, size] = {
                "own": (own.start, own.stop),
                "prefix": found.normed_prefix(),
                "tokens": found.store.read(slice(0, len(own))),
                "middle": kept.store.read(slice(0, len(own))),
                "mean": found.mean(),
                "num_bytes": found.processes.num_bytes,
            }
    torch.save(results, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()
