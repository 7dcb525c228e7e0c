"""Images one value after another: bits per dimension of causal transformers on tiles of a real image, and samples.

    python tools/benchmarks/pixels train SLIDE.svs --shrink 2 --mixer performer --cpu-s 240 --out runs/pixels
    python tools/benchmarks/pixels train SLIDE.svs --shrink 2 --mixer reformer --depth 12 --cpu-s 240 --out runs/pixels
    python tools/benchmarks/pixels report runs/pixels --picture bits.png
    python tools/benchmarks/pixels sample runs/pixels/performer_softmax+_6_32.pt SLIDE.svs samples.png

The sequence has a token for each band of each pixel: 3,072 in a tile of 32 px, 12,288 in one of 64 px. Each run is a
process of its own, of one thread. Weights and tiles follow the seed; with --cpu-s the number of steps follows the
machine.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from pixel_model import Generator, ModelOptions, PixelTransformer, bits_per_dim
from pixel_pictures import save_curves, save_grid
from pixel_tiles import TileSource, simple_models
from pixel_training import Budget, train_model

sys.path.insert(0, str(Path(__file__).parents[1]))
from anonymous_memory import anonymous_mib

from perf_vit.workflows.progress import say

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False)

TEST_SEED = 1_000_000


@app.command()
def train(
    image: Annotated[Path, typer.Argument(help="Raster or slide with three bands of bytes.")],
    out: Annotated[Path, typer.Option(help="Folder that gets the run's .json and .pt.")],
    mixer: Annotated[str, typer.Option(help="performer, reformer, softmax, or none for no attention.")] = "performer",
    kernel: Annotated[str, typer.Option(help="Kernel of performer.")] = "softmax+",
    depth: Annotated[int, typer.Option(help="Blocks.")] = 6,
    side: Annotated[int, typer.Option(help="Rows and columns of a tile.")] = 32,
    neighbours: Annotated[bool, typer.Option(help="Tokens get the values to the left and above, too.")] = True,
    shrink: Annotated[int, typer.Option(help="Shrink the image this many times first.")] = 1,
    min_contrast: Annotated[float, typer.Option(help="Smallest standard deviation of a tile's bytes.")] = 15.0,
    steps: Annotated[int, typer.Option(help="Training steps.")] = 300,
    cpu_s: Annotated[float | None, typer.Option(help="CPU seconds of training, instead of steps.")] = None,
    batch_size: Annotated[int, typer.Option(help="Tiles of a step.")] = 1,
    lr: Annotated[float, typer.Option(help="Peak learning rate.")] = 3e-3,
    num_tiles: Annotated[int, typer.Option(help="Test tiles.")] = 16,
    num_tests: Annotated[int, typer.Option(help="Tests during training, the last at its end.")] = 12,
    seed: Annotated[int, typer.Option(help="Decides weights and tiles.")] = 0,
    name: Annotated[str | None, typer.Option(help="Name of the run.")] = None,
) -> None:
    """Train a model and test it in between."""
    torch.set_num_threads(1)
    tiles = TileSource(image, side, shrink, min_contrast)
    options = ModelOptions(mixer=mixer, kernel=kernel, depth=depth, side=side, neighbours=neighbours)
    test = tiles.draw("test", num_tiles, TEST_SEED)
    torch.manual_seed(seed)
    model = PixelTransformer(options)
    name = name or "_".join(map(str, [mixer, *([kernel] if mixer == "performer" else []), depth, side]))
    result = {
        "name": name,
        "image": image.stem,
        **asdict(options),
        "parameters": sum(each.numel() for each in model.parameters()),
        "simple": simple_models(tiles.draw("train", 512, TEST_SEED + 1), test, side),
        "curve": [],
    }
    out.mkdir(parents=True, exist_ok=True)
    budget = Budget(steps=steps, cpu_s=cpu_s, num_tests=num_tests)
    for point in train_model(model, tiles, test, budget, batch_size=batch_size, lr=lr, seed=seed):
        result["curve"].append(point)
        say(f"{name}: {json.dumps(point)}")
        # A run that is stopped keeps its curve.
        (out / f"{name}.json").write_text(json.dumps(result, indent=1))
    saved = {"options": asdict(options), "state": model.state_dict(), "shrink": shrink, "min_contrast": min_contrast}
    torch.save(saved, out / f"{name}.pt")


@app.command()
@torch.inference_mode()
def sample(
    run: Annotated[Path, typer.Argument(help="The .pt of a Performer.")],
    image: Annotated[Path, typer.Argument(help="The image it was trained on, for real tiles beside the samples.")],
    picture: Annotated[Path, typer.Argument(help="PNG: real test tiles, their completed upper halves, samples.")],
    number: Annotated[int, typer.Option(help="Tiles of each kind.")] = 6,
    seed: Annotated[int, typer.Option(help="Of the samples.")] = 0,
) -> None:
    """Draw images value by value; print time, memory and the size of the states."""
    torch.set_num_threads(1)
    saved = torch.load(run, weights_only=True)
    options = ModelOptions(**saved["options"])
    model = PixelTransformer(options).eval()
    model.load_state_dict(saved["state"])
    real = TileSource(image, options.side, saved["shrink"], saved["min_contrast"]).draw("test", number, TEST_SEED)
    # The first rows complete real tiles, the others begin with nothing.
    given = torch.zeros(2 * number, options.length, dtype=torch.bool)
    given[:number, : options.length // 2] = True
    generator, random = Generator(model, 2 * number), torch.Generator().manual_seed(seed)
    steps, seconds, memory, of_given = (100, max(0, (options.length - 1) // 1000 * 1000)), [], [], []
    for place in range(options.length):
        start = time.process_time()
        logits = generator.logits()
        drawn = torch.multinomial(logits.softmax(dim=-1), 1, generator=random)[:, 0]
        generator.append(torch.where(given[:, place], real.repeat(2, 1)[:, place], drawn))
        seconds.append(time.process_time() - start)
        if place < 2 * options.side * 3:
            of_given.append(logits[:number])
        if place in steps:
            memory.append(f"{anonymous_mib():.1f} MiB at step {place:,}")
    quarters = np.array(seconds).reshape(4, -1).mean(axis=1) * 1e3
    first = len(of_given)
    one_by_one = bits_per_dim(torch.stack(of_given, dim=1), real[:, :first])
    at_once = bits_per_dim(model(real)[:, :first], real[:, :first])
    say(f"{options.length:,} steps of {2 * number} images, {options.mixer} {options.kernel}, {options.depth} blocks")
    say(f"CPU milliseconds a step in each quarter: {', '.join(f'{each:.2f}' for each in quarters)}")
    say(f"anonymous memory: {', '.join(memory)}; states: {generator.state_bytes() / 2**20:.2f} MiB")
    say(f"bits per dimension of the first two rows: {one_by_one:.4f} one by one, {at_once:.4f} at once")
    rows = torch.cat([real, generator.values]).reshape(3, number, options.side, options.side, 3)
    save_grid(rows.numpy().astype(np.uint8), picture)


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(help="Folders of runs, one for each image.")],
    picture: Annotated[Path | None, typer.Option(help="PNG of bits per dimension against steps and CPU time.")] = None,
) -> None:
    """Print a table of all runs, and draw their curves."""
    groups = {folder.name: [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))] for folder in runs}
    for title, results in groups.items():
        say("", f"| {title} | L | parameters | steps | CPU s | CPU s a step | test, bits per dimension |")
        say("|---|---|---|---|---|---|---|")
        for result in results:
            last, length = result["curve"][-1], ModelOptions(side=result["side"]).length
            cells = [f"{length:,}", f"{result['parameters']:,}", f"{last['step']:,}", f"{last['cpu_s']:.0f}"]
            cells += [f"{last['cpu_s'] / last['step']:.2f}", f"{last['test']:.3f}"]
            say(f"| {' | '.join([result['name'], *cells])} |")
        for side, simple in {each["side"]: each["simple"] for each in results}.items():
            say(f"without a network, {side} px: {', '.join(f'{name} {bits:.3f}' for name, bits in simple.items())}")
    if picture is not None:
        save_curves({f"{each[0]['image']}, {each[0]['side']} px": each for each in groups.values()}, picture)


if __name__ == "__main__":
    app()
