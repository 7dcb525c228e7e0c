"""Small slides with known pixels on every level."""

from pathlib import Path

import numpy as np
import tifffile
import zarr

NAMES = ("DAPI", "CD3 µ", "panCK")


def noise(height: int, width: int, num_bands: int = 3, dtype: str = "uint8", seed: int = 0) -> np.ndarray:
    """[H, W, C]."""
    rng = np.random.default_rng(seed)
    high = {"uint8": 256, "uint16": 65_536}.get(dtype, 1)
    return (rng.random((height, width, num_bands)) * high).astype(dtype)


def levels_of(height: int, width: int, num_levels: int, *, seed: int = 0) -> list[np.ndarray]:
    """Noise that halves, each level rounded down."""
    pixels = noise(height, width, seed=seed)
    return [pixels[: height >> k << k : 1 << k, : width >> k << k : 1 << k].copy() for k in range(num_levels)]


def write_pyramid(
    path: Path,
    levels: list[np.ndarray],
    *,
    mpp_xy: tuple[float, float] | None = None,
    aperio_mpp: float | None = None,
    magnification: float | None = 20,
    icc: bytes | None = None,
) -> Path:
    """A tiled TIFF that OpenSlide opens, levels [H, W, 3] as they are given."""
    stated = {"AppMag": magnification, "MPP": aperio_mpp}
    listed = "".join(f"|{name} = {value}" for name, value in stated.items() if value is not None)
    is_aperio = aperio_mpp is not None or path.suffix == ".svs"
    description = f"Aperio Image Library\r\n{listed}" if is_aperio else None
    with tifffile.TiffWriter(path) as writer:
        for k, level in enumerate(levels):
            place = {}
            if mpp_xy is not None:
                per_cm = tuple(1e4 / (mpp * 2**k) for mpp in mpp_xy)
                place = {"resolution": per_cm, "resolutionunit": "CENTIMETER"}
            writer.write(
                level,
                tile=(64, 64),
                photometric="rgb",
                compression="zlib",
                subfiletype=1 if k else 0,
                description=description,
                metadata=None,
                iccprofile=icc,
                **place,
            )
    return path


def write_tiff(
    path: Path,
    levels: list[np.ndarray],
    axes: str = "CYX",
    *,
    unit: str = "µm",
    size: tuple[float, float] | None = (0.65, 0.65),
    names: tuple[str, ...] = NAMES,
) -> Path:
    metadata = {"axes": axes}
    for axis, side in zip("XY", size or (), strict=False):
        metadata |= {f"PhysicalSize{axis}": side, f"PhysicalSize{axis}Unit": unit}
    if "C" in axes:
        metadata["Channel"] = {"Name": list(names)}
    photometric = "rgb" if axes.endswith("S") else "minisblack"
    with tifffile.TiffWriter(path, ome=True) as writer:
        options = {"tile": (64, 64), "photometric": photometric, "compression": "zlib"}
        writer.write(levels[0], subifds=len(levels) - 1, metadata=metadata, **options)
        for level in levels[1:]:
            writer.write(level, subfiletype=1, **options)
    return path


def write_zarr(
    path: Path,
    levels: list[np.ndarray],
    version: str,
    *,
    axes: str = "cyx",
    unit: str | None = "micrometer",
    mpp: float = 0.5,
    names: tuple[str, ...] = NAMES,
) -> Path:
    group = zarr.open_group(path, mode="w", zarr_format=2 if version == "0.4" else 3)
    datasets = []
    for k, level in enumerate(levels):
        array = group.create_array(
            str(k), shape=level.shape, chunks=(1,) * (level.ndim - 2) + (64, 64), dtype=level.dtype
        )
        array[...] = level
        scale = [1.0] * (level.ndim - 2) + [mpp * 2**k] * 2
        datasets.append({"path": str(k), "coordinateTransformations": [{"type": "scale", "scale": scale}]})
    place = {} if unit is None else {"unit": unit}
    listed = [{"name": a, "type": "space", **place} if a in "yx" else {"name": a, "type": "channel"} for a in axes]
    content = {
        "multiscales": [{"version": version, "axes": listed, "datasets": datasets}],
        "omero": {"channels": [{"label": name} for name in names]},
    }
    group.attrs.update(content if version == "0.4" else {"ome": {"version": "0.5", **content}})
    return path


def planes(dtype: str = "uint16") -> list[np.ndarray]:
    pixels = noise(413, 307, 3, dtype).transpose(2, 0, 1)
    return [np.ascontiguousarray(pixels[:, : 413 >> k << k : 1 << k, : 307 >> k << k : 1 << k]) for k in range(3)]
