"""Make the picture of docs/slides.md: generated slides with the outline of the tissue that `tissue="auto"` finds.

    python tools/tissue_figure.py docs/images/tissue.jpg

The slides are of the kinds of tests/sources/slides/test_tissue_auto.py, at 8 micrometres per pixel, written as pyramids
and read like any slide.
"""

from __future__ import annotations

import sys
import tempfile
from contextlib import closing
from pathlib import Path

import numpy as np
import numpy.typing as npt
import typer
from PIL import Image, ImageDraw

import perf_vit
from perf_vit.plotting import label_font, tissue_picture

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "support"))
from slides import write_pyramid
from tissue_pictures import TissuePicture, fluorescence_picture, stained_picture

Picture = npt.NDArray[np.uint8]

SEED, SHAPE = 21, (420, 560)
PANEL_PX, GAP_PX, TITLE_PX, COLUMNS = 320, 8, 22, 3


def main(out: Path) -> None:
    """Write the picture."""
    panels = [titled(name, outline(made)) for name, made in slides().items()]
    rows = [np.concatenate(panels[start : start + COLUMNS], axis=1) for start in range(0, len(panels), COLUMNS)]
    Image.fromarray(np.concatenate(rows)).save(out, quality=80, optimize=True)


def slides() -> dict[str, TissuePicture]:
    """Generate the slides, by title."""
    stained = {
        "pale H&E": "pale",
        "IHC, counterstain": "ihc",
        "blue pen": "blue ink",
        "glass edge, cracks, bubbles": "glass edge",
        "black padding": "black padding",
    }
    made = {title: stained_picture(kind, SEED, SHAPE) for title, kind in stained.items()}
    return {**made, "fluorescence": fluorescence_picture(SEED, num_channels=3, dtype="uint8", shape=SHAPE)}


def outline(made: TissuePicture) -> Picture:
    """Draw a slide with the outline of its tissue, PANEL_PX wide."""
    pixels = made.pixels.transpose(1, 2, 0).copy()
    with tempfile.TemporaryDirectory() as folder:
        path = write_pyramid(Path(folder, "slide.svs"), [pixels, pixels[::4, ::4].copy()], aperio_mpp=8.0)
        with closing(perf_vit.open(path, tissue="auto")) as source:
            return tissue_picture(source, PANEL_PX)


def titled(title: str, picture: Picture) -> Picture:
    """Put a title above a picture, and a white rim around it."""
    height, width = picture.shape[:2]
    panel = Image.new("RGB", (width + GAP_PX, height + TITLE_PX + GAP_PX), "white")
    panel.paste(Image.fromarray(picture), (GAP_PX // 2, TITLE_PX))
    ImageDraw.Draw(panel).text((GAP_PX // 2, 3), title, fill="black", font=label_font(13))
    return np.asarray(panel)


if __name__ == "__main__":
    typer.run(main)
