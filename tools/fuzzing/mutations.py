"""Damage done to a file's bytes; every mutation is decided by its generator."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable

import numpy as np

__all__ = ["BYTE_MUTATIONS", "UNDAMAGED", "Rng", "mutate_png", "mutate_tiff_tag"]

Rng = np.random.Generator

_HUGE = (0, 1, 0x7F, 0xFF, 0x7FFF, 0xFFFF, 60_000, 100_000, 0x7FFFFFFF, 0xFFFFFFFF, 2**40, 2**63 - 1, 2**64 - 1)
_HEADER_BYTES = 1024
_PNG_SIGNATURE_BYTES = 8


def truncate(data: bytes, other: bytes, rng: Rng) -> bytes:
    """Cut the end off, more often near the start or the end than in between."""
    place = rng.choice([0, rng.integers(0, min(64, len(data)) + 1), rng.integers(0, len(data) + 1), len(data) - 1])
    return data[: int(place)]


def flip_bits(data: bytes, other: bytes, rng: Rng) -> bytes:
    """Flip 1 to 64 bits, half the time in the header alone."""
    changed = bytearray(data)
    limit = len(data) if rng.random() < 0.5 else min(_HEADER_BYTES, len(data))
    for place in rng.integers(0, limit, int(2 ** rng.uniform(0, 6))):
        changed[place] ^= 1 << int(rng.integers(8))
    return bytes(changed)


def overwrite(data: bytes, other: bytes, rng: Rng) -> bytes:
    """Overwrite a range with zeros, ones, noise or other bytes of the same file."""
    start = int(rng.integers(0, len(data)))
    length = min(int(2 ** rng.uniform(0, 10)), len(data) - start)
    source = int(rng.integers(0, len(data) - length + 1))
    new = (bytes(length), b"\xff" * length, rng.bytes(length), data[source : source + length])[int(rng.integers(4))]
    return data[:start] + new + data[start + length :]


def splice(data: bytes, other: bytes, rng: Rng) -> bytes:
    """Put the header of one file on the body of another."""
    place = int(2 ** rng.uniform(2, np.log2(max(8, min(len(data), len(other))))))
    return data[:place] + other[place:] if rng.random() < 0.5 else other[:place] + data[place:]


def repeat_chunk(data: bytes, other: bytes, rng: Rng) -> bytes:
    """Repeat or leave out a range."""
    start, stop = sorted(rng.integers(0, len(data) + 1, 2).tolist())
    times = int(rng.choice([0, 2, 3, 50]))
    return data[:start] + data[start:stop] * times + data[stop:]


def huge_number(data: bytes, other: bytes, rng: Rng) -> bytes:
    """Write an extreme integer over two, four or eight bytes, mostly of the header: sizes, counts, offsets."""
    changed = bytearray(data)
    for _ in range(int(rng.integers(1, 4))):
        length = int(rng.choice([2, 4, 8]))
        limit = min(len(data), _HEADER_BYTES) if rng.random() < 0.8 else len(data)
        place = int(rng.integers(0, max(1, limit - length))) // 2 * 2
        value = int(_HUGE[rng.integers(len(_HUGE))]) % 256**length
        changed[place : place + length] = value.to_bytes(length, "little" if rng.random() < 0.5 else "big")
    return bytes(changed[: len(data)])


def mutate_png(data: bytes, other: bytes, rng: Rng) -> bytes:
    """Change the content of a PNG chunk, or repeat it, with a checksum that fits."""
    chunks = _png_chunks(data)
    if not chunks:
        return flip_bits(data, other, rng)
    index = 0 if rng.random() < 0.5 else int(rng.integers(len(chunks)))
    kind, content = chunks[index]
    if content and rng.random() < 0.9:
        content = (huge_number, flip_bits, overwrite)[int(rng.integers(3))](content, content, rng)
        chunks[index] = kind, content
    else:
        chunks.insert(index, (kind, content))
    made = data[:_PNG_SIGNATURE_BYTES]
    for kind, content in chunks:
        made += struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
    return made


def mutate_tiff_tag(data: bytes, other: bytes, rng: Rng) -> bytes:
    """Change tag, type, count or value of an entry of a classic TIFF's first directory."""
    order = "<" if data[:2] == b"II" else ">"
    try:
        (start,) = struct.unpack_from(f"{order}I", data, 4)
        (count,) = struct.unpack_from(f"{order}H", data, start)
        place = start + 2 + 12 * int(rng.integers(max(1, count)))
        entry = list(struct.unpack_from(f"{order}HHII", data, place))
    except struct.error:
        return huge_number(data, other, rng)
    field = int(rng.choice([0, 1, 2, 3], p=[0.1, 0.1, 0.3, 0.5]))
    entry[field] = int(_HUGE[rng.integers(len(_HUGE))]) % (2**16 if field < 2 else 2**32)
    if field == 0:
        entry[0] = int(
            rng.choice([256, 257, 258, 259, 262, 273, 277, 279, 317, 320, 322, 330, 338, 33550, 34735, 42112])
        )
    changed = bytearray(data)
    struct.pack_into(f"{order}HHII", changed, place, *entry)
    return bytes(changed)


def _png_chunks(data: bytes) -> list[tuple[bytes, bytes]]:
    found, place = [], _PNG_SIGNATURE_BYTES
    while place + 12 <= len(data):
        (length,) = struct.unpack_from(">I", data, place)
        found.append((data[place + 4 : place + 8], data[place + 8 : place + 8 + length]))
        place += 12 + length
    return found


UNDAMAGED = "undamaged"
"""The control, which is no mutation to choose."""

BYTE_MUTATIONS: dict[str, Callable[[bytes, bytes, Rng], bytes]] = {
    "truncated": truncate,
    "bits flipped": flip_bits,
    "overwritten": overwrite,
    "spliced": splice,
    "repeated": repeat_chunk,
    "huge numbers": huge_number,
}
"""(data, data of another file, generator) -> data, for any kind of file."""
