"""As 19, through predict: an encoder whose output overflows (here its weights do).

Right: a refusal that names NaN features; not a traceback, not a class.
"""

from _kit import *
import torch

root = work("42")
(root / "s").mkdir(), (root / "new").mkdir()
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
path = root / "run/checkpoints/best.ckpt"
content = torch.load(path, map_location="cpu", weights_only=False)
name = next(k for k in content["state_dict"] if "encoder" in k and k.endswith("patch_embed.proj.weight"))
content["state_dict"][name] *= 1e38
torch.save(content, root / "hot.ckpt")
status, text = cli(
    "predict",
    "--checkpoint",
    root / "hot.ckpt",
    "--input",
    root / "s/s0.svs",
    "--output",
    root / "found.csv",
    "--device",
    "cpu",
)
rows = (root / "found.csv").read_text() if (root / "found.csv").exists() else "none"
verdict(
    status == 2 and ("nan" in text.lower() or "finite" in text.lower()),
    f"exit {status}: {last(text, 2)!r}; csv: {rows!r}",
)
