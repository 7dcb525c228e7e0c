"""DICOM whole slides made by hand: uncompressed tiles, explicit little endian, one file a level."""

import struct
from pathlib import Path

import numpy as np

WHOLE_SLIDE = "1.2.840.10008.5.1.4.1.1.77.1.6"


def element(tag: int, vr: str, value: object) -> bytes:
    """One element; of a sequence the value is the content of its only item."""
    if vr == "SQ":
        assert isinstance(value, bytes)
        value = struct.pack("<HHI", 0xFFFE, 0xE000, len(value)) + value
    elif vr in ("US", "UL", "FL", "FD"):
        value = struct.pack({"US": "<H", "UL": "<I", "FL": "<f", "FD": "<d"}[vr], value)
    elif isinstance(value, str):
        value = value.encode()
    assert isinstance(value, bytes)
    value += (b"\0" if vr in ("UI", "OW") else b" ") * (len(value) % 2)
    head = struct.pack("<HH", tag >> 16, tag & 0xFFFF) + vr.encode()
    return head + (struct.pack("<HI", 0, len(value)) if vr in ("SQ", "OW") else struct.pack("<H", len(value))) + value


def write_level(path: Path, pixels: np.ndarray, *, mpp: float, series: str, number: int, tile: int = 64) -> Path:
    """One level of a slide, [H, W, 3]."""
    height, width = pixels.shape[:2]
    rows, cols = -(-height // tile), -(-width // tile)
    padded = np.full((rows * tile, cols * tile, 3), 255, np.uint8)
    padded[:height, :width] = pixels
    frames = padded.reshape(rows, tile, cols, tile, 3).transpose(0, 2, 1, 3, 4)
    kind = "ORIGINAL\\PRIMARY\\VOLUME\\NONE" if number == 1 else "DERIVED\\PRIMARY\\VOLUME\\RESAMPLED"
    instance = f"{series}.{number}"
    measures = element(0x00280030, "DS", f"{mpp / 1000:.6f}\\{mpp / 1000:.6f}")
    meta = element(0x00020002, "UI", WHOLE_SLIDE) + element(0x00020003, "UI", instance)
    meta += element(0x00020010, "UI", "1.2.840.10008.1.2.1") + element(0x00020012, "UI", "1.2.3.4")
    content = [
        element(0x00080008, "CS", kind),
        element(0x00080016, "UI", WHOLE_SLIDE),
        element(0x00080018, "UI", instance),
        element(0x00080060, "CS", "SM"),
        element(0x0020000D, "UI", "1.2.9"),
        element(0x0020000E, "UI", series),
        element(0x00209311, "CS", "TILED_FULL"),
        element(0x00280002, "US", 3),
        element(0x00280004, "CS", "RGB"),
        element(0x00280006, "US", 0),
        element(0x00280008, "IS", str(rows * cols)),
        element(0x00280010, "US", tile),
        element(0x00280011, "US", tile),
        element(0x00280100, "US", 8),
        element(0x00280101, "US", 8),
        element(0x00280102, "US", 7),
        element(0x00280103, "US", 0),
        element(0x00480001, "FL", width * mpp / 1000),
        element(0x00480002, "FL", height * mpp / 1000),
        element(0x00480006, "UL", width),
        element(0x00480007, "UL", height),
        element(0x00480303, "UL", 1),
        element(0x52009229, "SQ", element(0x00289110, "SQ", measures)),
        element(0x7FE00010, "OW", frames.tobytes()),
    ]
    head = b"\0" * 128 + b"DICM" + element(0x00020000, "UL", len(meta)) + meta
    path.write_bytes(head + b"".join(content))
    return path


def write_dicom_slide(folder: Path, levels: list[np.ndarray], *, mpp: float = 0.5, series: str = "1.2.3.1") -> Path:
    """A folder with a slide, a file a level."""
    folder.mkdir(parents=True, exist_ok=True)
    for k, pixels in enumerate(levels):
        name = f"{series}.level-{k}.dcm"
        write_level(folder / name, pixels, mpp=mpp * 2**k, series=series, number=k + 1)
    return folder
