"""Images one value after another: bits per dimension of causal transformers on tiles of a real image, and samples.

    python tools/benchmarks/pixels train SLIDE.svs --shrink 2 --mixer performer --depth 6 --out runs/pixels
    python tools/benchmarks/pixels train SLIDE.svs --shrink 2 --mixer reformer --depth 12 --out runs/pixels
    python tools/benchmarks/pixels report runs/pixels --picture bits.png
    python tools/benchmarks/pixels sample runs/pixels/performer_softmax+_6_32.pt SLIDE.svs samples.png

The sequence has a token for each band of each pixel: 3,072 in a tile of 32 px, 12,288 in one of 64 px. Each run is a
process of its own, of one thread. Everything random follows the seed.
"""

from __future__ import annotations

import json
import math
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image
from pixel_model import Generator, ModelOptions, PixelTransformer, bits_per_dim
from pixel_tiles import TileSource, simple_models

sys.path.insert(0, str(Path(__file__).parents[1]))
from anonymous_memory import AnonymousPeak

from perf_vit.tasks.optim import warmup_cosine
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
    batch_size: Annotated[int, typer.Option(help="Tiles of a step.")] = 2,
    lr: Annotated[float, typer.Option(help="Peak learning rate.")] = 3e-3,
    num_tests: Annotated[int, typer.Option(help="Test tiles.")] = 16,
    test_every: Annotated[int, typer.Option(help="Steps between tests.")] = 50,
    seed: Annotated[int, typer.Option(help="Decides weights and tiles.")] = 0,
    name: Annotated[str | None, typer.Option(help="Name of the run.")] = None,
) -> None:
    """Train a model and test it in between."""
    torch.set_num_threads(1)
    tiles = TileSource(image, side, shrink, min_contrast)
    options = ModelOptions(mixer=mixer, kernel=kernel, depth=depth, side=side, neighbours=neighbours)
    test = tiles.draw("test", num_tests, TEST_SEED)
    torch.manual_seed(seed)
    model = PixelTransformer(options)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.01)
    seconds, curve = 0.0, []
    for step in range(steps):
        values = tiles.draw("train", batch_size, seed * steps + step)
        start = time.process_time()
        for group in optimizer.param_groups:
            group["lr"] = lr * warmup_cosine(step, steps, 0.1)
        loss = bits_per_dim(model(values), values)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        seconds += time.process_time() - start
        if step % test_every == test_every - 1 or step == steps - 1:
            curve.append({"step": step + 1, "cpu_s": seconds, "train": loss.item(), "test": tested(model, test)})
            say(f"{mixer} {kernel} {depth}: {json.dumps(curve[-1])}")
    name = name or "_".join(map(str, [mixer, *([kernel] if mixer == "performer" else []), depth, side]))
    simple = simple_models(tiles.draw("train", 512, TEST_SEED + 1), test, side)
    parameters = sum(each.numel() for each in model.parameters())
    result = {
        "name": name,
        "image": image.stem,
        **asdict(options),
        "parameters": parameters,
        "curve": curve,
        "simple": simple,
    }
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{name}.json").write_text(json.dumps(result, indent=1))
    saved = {"options": asdict(options), "state": model.state_dict(), "shrink": shrink, "min_contrast": min_contrast}
    torch.save(saved, out / f"{name}.pt")


@torch.inference_mode()
def tested(model: PixelTransformer, test: torch.Tensor) -> float:
    """Return the mean bits per dimension of test tiles, one at a time."""
    model.eval()
    bits = [bits_per_dim(model(tile[None]), tile[None]).item() for tile in test]
    model.train()
    return float(np.mean(bits))


@app.command()
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
    bits, marks = 0.0, []
    watch = None
    for place in range(options.length):
        if place % (options.length // 4) == 0:
            marks.append(time.process_time())
            # Buffers of torch exist after some steps.
            watch = watch or (AnonymousPeak() if place else None)
        logits = generator.logits()
        bits -= logits[:number].log_softmax(dim=-1).gather(1, real[:, place, None]).sum().item() / math.log(2)
        drawn = torch.multinomial(logits.softmax(dim=-1), 1, generator=random)[:, 0]
        generator.append(torch.where(given[:, place], real.repeat(2, 1)[:, place], drawn))
    quarters = np.diff([*marks, time.process_time()]) / (options.length // 4) * 1e3
    assert watch is not None
    say(f"{options.length:,} steps of {2 * number} images, {options.mixer} {options.kernel}, {options.depth} blocks")
    say(f"milliseconds a step in each quarter: {', '.join(f'{each:.2f}' for each in quarters)}")
    say(f"growth in the last three quarters: {watch.stop():.1f} MiB; states: {generator.state_bytes() / 2**20:.1f} MiB")
    rows = torch.cat([real, generator.values]).reshape(3, number, options.side, options.side, 3)
    save_grid(rows.numpy().astype(np.uint8), picture)


def save_grid(tiles: np.ndarray, picture: Path, scale: int = 3, gap: int = 4) -> None:
    """Save tiles, [rows, columns, side, side, 3], enlarged and side by side."""
    tiles = np.pad(
        tiles.repeat(scale, axis=2).repeat(scale, axis=3),
        [(0, 0), (0, 0), (0, gap), (0, gap), (0, 0)],
        constant_values=255,
    )
    rows, columns, height, width, _ = tiles.shape
    Image.fromarray(tiles.transpose(0, 2, 1, 3, 4).reshape(rows * height, columns * width, 3)).save(picture)


@app.command()
def report(
    runs: Annotated[Path, typer.Argument(help="Folder of the runs.")],
    picture: Annotated[Path | None, typer.Option(help="PNG of bits per dimension against steps and CPU time.")] = None,
) -> None:
    """Print a table of all runs, and draw their curves."""
    results = [json.loads(path.read_text()) for path in sorted(runs.glob("*.json"))]
    say("| run | L | parameters | steps | CPU s a step | test, bits per dimension |", "|---|---|---|---|---|---|")
    simple = {}
    for result in results:
        last, length = result["curve"][-1], ModelOptions(side=result["side"]).length
        cells = [f"{length:,}", f"{result['parameters']:,}", str(last["step"]), f"{last['cpu_s'] / last['step']:.2f}"]
        say(f"| {' | '.join([result['name'], *cells, format(last['test'], '.3f')])} |")
        simple[f"{result['image']}, {result['side']} px"] = result["simple"]
    for tiles, models in simple.items():
        say(f"{tiles}: {', '.join(f'{name} {bits:.3f}' for name, bits in models.items())}")
    if picture is None:
        return
    figure = Figure(figsize=(10, 4), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, key, label in zip(figure.subplots(1, 2, sharey=True), ("step", "cpu_s"), ("step", "CPU s"), strict=True):
        for result in results:
            axes.plot(
                [each[key] for each in result["curve"]],
                [each["test"] for each in result["curve"]],
                label=result["name"],
            )
        axes.set(xlabel=label, ylabel="test, bits per dimension")
        axes.grid(alpha=0.3)
    axes.legend(fontsize=7)
    figure.savefig(picture, dpi=110)


if __name__ == "__main__":
    app()
