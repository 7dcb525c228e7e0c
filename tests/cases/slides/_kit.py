"""Small inputs made from scratch, shared by the cases. Everything is seeded."""

import contextlib, io, json, os, shutil, struct, sys, tempfile, warnings

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MKL_NUM_THREADS", "1")
from pathlib import Path
import numpy as np

from encoder_weights import save_encoder

PINK, VIOLET, GLASS = (228, 168, 200), (104, 62, 150), (243, 243, 243)


def work(name):
    root = Path(tempfile.gettempdir()) / "perf_vit_cases" / name
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir(parents=True)
    return root


def verdict(ok, text):
    print(f"{'PASS' if ok else 'FAIL'}: {text}")
    sys.exit(0 if ok else 1)


def picture(height, width, boxes, *, seed=0, colour=PINK, nuclei=True, glass=GLASS, radius=4):
    """[H, W, 3] uint8: glass, and tissue in the boxes (row, col, row_stop, col_stop)."""
    rng = np.random.default_rng(seed)
    out = np.empty((height, width, 3), np.int16)
    out[:] = glass
    for r0, c0, r1, c1 in boxes:
        out[r0:r1, c0:c1] = colour
        if nuclei:
            for _ in range((r1 - r0) * (c1 - c0) // 900):
                y, x = rng.integers(r0, r1), rng.integers(c0, c1)
                yy, xx = np.ogrid[max(r0, y - radius) : min(r1, y + radius), max(c0, x - radius) : min(c1, x + radius)]
                disk = (yy - y) ** 2 + (xx - x) ** 2 < radius**2
                out[max(r0, y - radius) : min(r1, y + radius), max(c0, x - radius) : min(c1, x + radius)][disk] = VIOLET
    out += rng.integers(-3, 4, (height, width, 1), dtype=np.int16)
    return out.clip(0, 255).astype(np.uint8)


def halves(image, num):
    found = [image]
    for _ in range(num - 1):
        last = found[-1]
        h, w = last.shape[0] // 2, last.shape[1] // 2
        found.append(last[: h * 2, : w * 2].reshape(h, 2, w, 2, -1).mean((1, 3)).round().astype(image.dtype))
    return found


def svs(path, image, *, mpp=0.5, num_levels=3, tile=64, description=None, **place):
    """A tiled pyramid that OpenSlide reads; an Aperio description if mpp is given."""
    import tifffile

    if description is None and mpp is not None:
        description = f"Aperio Image Library\r\n|AppMag = 20|MPP = {mpp}"
    with tifffile.TiffWriter(path) as writer:
        for k, level in enumerate(halves(image, num_levels)):
            writer.write(
                level,
                tile=(tile, tile),
                photometric="rgb",
                compression="zlib",
                subfiletype=1 if k else 0,
                description=description,
                metadata=None,
                **place,
            )
    return Path(path)


def mrxs(path, image, present, *, tile=128, num_levels=3, mpp=0.5):
    """A MIRAX slide: images of `tile` px on a grid, of which only those in `present` [rows, cols] exist.

    Written from the layout that OpenSlide's reader expects: Slidedat.ini, Index.dat and one data file of PNGs.
    """
    from PIL import Image

    path = Path(path)
    folder = path.with_suffix("")
    folder.mkdir(parents=True)
    path.write_bytes(b"\xff\xd8\xff\xd9")
    rows, cols = present.shape
    assert image.shape[:2] == (rows * tile, cols * tile)
    uuid = "0123456789ABCDEF0123456789ABCDEF"
    data, entries = bytearray(b"data"), []
    for level, pixels in enumerate(halves(image, num_levels)):
        step, found = 1 << level, []
        for row in range(0, rows, step):
            for col in range(0, cols, step):
                if not present[row : row + step, col : col + step].any():
                    continue
                cell = np.full((tile, tile, 3), 255, np.uint8)
                part = pixels[
                    row * tile // step : row * tile // step + tile, col * tile // step : col * tile // step + tile
                ]
                cell[: part.shape[0], : part.shape[1]] = part
                buffer = io.BytesIO()
                Image.fromarray(cell).save(buffer, "png")
                found.append((row * cols + col, len(data), len(buffer.getvalue()), 0))
                data += buffer.getvalue()
        entries.append(found)
    (folder / "Data0000.dat").write_bytes(bytes(data))
    head = b"01.02" + uuid.encode()
    base = len(head) + 8
    table = base
    body, pointers, place = b"", [], table + 4 * num_levels
    for found in entries:
        pointers.append(place + len(body))
        start = place + len(body) + 8
        body += struct.pack("<ii", 0, start) + struct.pack("<ii", len(found), 0)
        body += b"".join(struct.pack("<iiii", *each) for each in found)
    index = head + struct.pack("<ii", table, table) + struct.pack(f"<{num_levels}i", *pointers) + body
    (folder / "Index.dat").write_bytes(index)
    text = [
        "[GENERAL]",
        f"SLIDE_ID = {uuid}",
        f"IMAGENUMBER_X = {cols}",
        f"IMAGENUMBER_Y = {rows}",
        "OBJECTIVE_MAGNIFICATION = 20",
        "CameraImageDivisionsPerSide = 1",
        "[HIERARCHICAL]",
        "HIER_COUNT = 1",
        "NONHIER_COUNT = 0",
        "INDEXFILE = Index.dat",
        "HIER_0_NAME = Slide zoom level",
        f"HIER_0_COUNT = {num_levels}",
    ]
    text += [f"HIER_0_VAL_{k}_SECTION = LEVEL_{k}" for k in range(num_levels)]
    text += ["[DATAFILE]", "FILE_COUNT = 1", "FILE_0 = Data0000.dat"]
    for k in range(num_levels):
        text += [
            f"[LEVEL_{k}]",
            f"IMAGE_CONCAT_FACTOR = {int(k > 0)}",
            "OVERLAP_X = 0",
            "OVERLAP_Y = 0",
            f"MICROMETER_PER_PIXEL_X = {mpp * 2**k}",
            f"MICROMETER_PER_PIXEL_Y = {mpp * 2**k}",
            "IMAGE_FILL_COLOR_BGR = 16777215",
            f"DIGITIZER_WIDTH = {tile}",
            f"DIGITIZER_HEIGHT = {tile}",
            "IMAGE_FORMAT = PNG",
        ]
    (folder / "Slidedat.ini").write_text("\n".join(text).replace(" = ", " = ") + "\n")
    return path


def feature(geometry, classification="none", **more):
    properties = {"objectType": "annotation", **more}
    if classification != "none":
        properties["classification"] = classification
    return {"type": "Feature", "id": "0", "geometry": geometry, "properties": properties}


def box(c0, r0, c1, r1):
    return {"type": "Polygon", "coordinates": [[[c0, r0], [c1, r0], [c1, r1], [c0, r1], [c0, r0]]]}


def collection(*features):
    return {"type": "FeatureCollection", "features": list(features)}


def save(path, content):
    Path(path).write_text(json.dumps(content))
    return Path(path)


def cli(*args):
    """(exit status, stdout + stderr) of perf-vit in this process; a traceback counts as status 70."""
    import traceback
    from perf_vit.cli.main import run

    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = run([str(each) for each in args])
        except SystemExit as stop:
            status = stop.code or 0
        except BaseException:
            traceback.print_exc()
            status = 70
    return status, out.getvalue() + err.getvalue()


TINY = "backbone_kwargs: {depth: 1, embed_dim: 64, num_heads: 2, attn_kwargs: {num_features: 16}}"
ENCODER = tempfile.TemporaryDirectory()
SLIDE_CONFIG = f"""
out: ???
task: slide_classification
data: {{train: {{labels: "???", image: "???"}}, mpp: 1.0, tile_px: 32, min_tissue: 0.2, max_windows: 6, batch_size: 2, val_share: 0.4}}
model:
  backbone: performer_vit_tiny_patch16_224
  {TINY}
  weights: {save_encoder(Path(ENCODER.name, "encoder.safetensors"))}
  pool: avg
  hidden_dim: 32
  attention_dim: 16
optim: {{lr: 0.01}}
trainer: {{max_epochs: 2, accelerator: cpu}}
"""


def last(text, num=3):
    return " / ".join(line.strip() for line in text.strip().splitlines()[-num:])[:600]


def dicom_slide(folder, image, *, mpp=0.5, num_levels=3, tile=64, label=True):
    """A DICOM whole slide: one uncompressed TILED_FULL file a level, and a label; needs pydicom."""
    import pydicom
    from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
    from pydicom.sequence import Sequence

    folder = Path(folder)
    folder.mkdir(parents=True)
    paths = []
    files = [(f"level-{k}", pixels, "VOLUME", mpp * 2**k) for k, pixels in enumerate(halves(image, num_levels))]
    if label:
        files.append(("label", np.full((tile, tile, 3), 90, np.uint8), "LABEL", 10.0))
    for number, (name, pixels, flavor, size) in enumerate(files, 1):
        h, w = pixels.shape[:2]
        rows, cols = -(-h // tile), -(-w // tile)
        padded = np.full((rows * tile, cols * tile, 3), 255, np.uint8)
        padded[:h, :w] = pixels
        frames = padded.reshape(rows, tile, cols, tile, 3).transpose(0, 2, 1, 3, 4)
        meta = FileMetaDataset()
        meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.77.1.6"
        meta.MediaStorageSOPInstanceUID = f"1.2.3.4.{number}"
        meta.TransferSyntaxUID = "1.2.840.10008.1.2.1"
        meta.ImplementationClassUID = "1.2.3.4"
        d = FileDataset(None, {}, file_meta=meta, preamble=b"\0" * 128)
        d.SOPClassUID, d.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
        d.SeriesInstanceUID, d.StudyInstanceUID, d.Modality = f"1.2.3.{abs(hash(str(folder))) % 10**8}", "1.2.9", "SM"
        d.ImageType = [
            "ORIGINAL" if number == 1 else "DERIVED",
            "PRIMARY",
            flavor,
            "NONE" if number == 1 else "RESAMPLED",
        ]
        d.SamplesPerPixel, d.PhotometricInterpretation, d.PlanarConfiguration = 3, "RGB", 0
        d.NumberOfFrames, d.Rows, d.Columns = rows * cols, tile, tile
        d.BitsAllocated, d.BitsStored, d.HighBit, d.PixelRepresentation = 8, 8, 7, 0
        d.TotalPixelMatrixColumns, d.TotalPixelMatrixRows, d.TotalPixelMatrixFocalPlanes = w, h, 1
        d.DimensionOrganizationType = "TILED_FULL"
        measures, shared = Dataset(), Dataset()
        measures.PixelSpacing = [size / 1000, size / 1000]
        shared.PixelMeasuresSequence = Sequence([measures])
        d.SharedFunctionalGroupsSequence = Sequence([shared])
        d.PixelData = frames.tobytes()
        path = folder / f"{name}.dcm"
        d.save_as(path, enforce_file_format=True)
        paths.append(path)
    return paths
