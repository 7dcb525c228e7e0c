"""TRIDENT#151 ("errors crash the whole program; a lot of time has been wasted"), Patho-Bench#30: a long run over slides ends at a bad one.

perf-vit predict (slide classifier) on two good slides and a third that can't be read; default --on-error stop, then the same
command again. Right: the rows of the finished slides are on disk (or their features, so that the second run goes on).
"""

from _kit import *

root = work("40")
(root / "s").mkdir()
rows = []
for n in range(6):
    svs(
        root / "s" / f"s{n}.svs",
        picture(320, 320, [(32, 32, 300, 300)], seed=n, colour=PINK if n % 2 else (200, 190, 230)),
        mpp=0.5,
        num_levels=1,
    )
    rows.append(f"s{n},{'a' if n % 2 else 'b'}")
(root / "t.csv").write_text("slide,label\n" + "\n".join(rows) + "\n")
(root / "c.yaml").write_text(SLIDE_CONFIG)
status, text = cli(
    "train",
    root / "c.yaml",
    f"data.train.labels={root / 't.csv'}",
    f"data.train.image={root / 's'}",
    f"out={root / 'run'}",
)
assert status == 0, last(text)
(root / "new").mkdir()
for n in (1, 2):
    shutil.copy(root / "s" / f"s{n}.svs", root / "new" / f"{n}.svs")
(root / "new" / "3.svs").write_bytes((root / "s" / "s3.svs").read_bytes()[:5000])
checkpoint = root / "run/checkpoints/best.ckpt"
status, text = cli(
    "predict", "--checkpoint", checkpoint, "--input", root / "new", "--output", root / "found.csv", "--device", "cpu"
)
kept = (root / "found.csv").read_text().splitlines() if (root / "found.csv").exists() else []
verdict(
    len(kept) >= 3,
    f"exit {status}: {last(text, 1)!r}; rows of finished slides on disk: {max(0, len(kept) - 1)} of 2; attention files {sorted(p.name for p in root.glob('found_attention/*.geojson'))}",
)
