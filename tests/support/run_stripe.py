"""One of several processes that share an image; run as a script by `test_processes`.

`python run_stripe.py FOLDER RANK NUMBER` leaves FOLDER/RANK.pt.
"""

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from streamed_models import MODELS, Image, build_for, holes, streamed

SIZES = ((406, 311), (812, 622))


def main(folder: str, rank: str, number: str) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(os.path.join(folder, "store"), int(number))
    dist.init_process_group("gloo", store=store, rank=int(rank), world_size=int(number))
    results = {}
    for name in MODELS:
        for size in SIZES:
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


if __name__ == "__main__":
    main(*sys.argv[1:])
