"""tools/check_site.py finds broken links and files from elsewhere, and nothing in a site without them."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]

GOOD = """<link rel="stylesheet" href="_static/a.css"/><link rel="canonical" href="https://example.org/"/>
<body><h1 id="top">A</h1><a href="#top">top</a> <a href="b/index.html#an%20anchor">b</a> <a href="b/">b</a>
<a href="https://example.org/nowhere">elsewhere</a> <a href="mailto:a@example.org">mail</a>
<img src="_static/a.png"></body>
"""


def site(folder: Path, first_page: str, styles: str = "a { color: red }") -> Path:
    for name, text in {
        "index.html": first_page,
        "b/index.html": '<p id="an anchor">b</p>',
        "_static/a.css": styles,
        "_static/a.png": "",
    }.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return folder


def check(folder: Path) -> tuple[int, list[str]]:
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools" / "check_site.py"), str(folder)],
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout.splitlines()


def test_a_site_without_broken_links_passes(tmp_path) -> None:
    assert check(site(tmp_path, GOOD)) == (0, ["2 pages, all links lead somewhere"])


def test_missing_pages_anchors_and_pictures_are_named_with_their_page(tmp_path) -> None:
    links = '<a href="gone.html">1</a><a href="#gone">2</a><a href="b/index.html#gone">3</a><img src="gone.png">'
    code, lines = check(site(tmp_path, GOOD.replace("</body>", f"{links}</body>")))
    assert code == 1
    assert lines == [
        f"index.html: no target of {each}" for each in ("gone.html", "#gone", "b/index.html#gone", "gone.png")
    ]


def test_files_from_elsewhere_are_named(tmp_path) -> None:
    page = GOOD.replace("</body>", '<script src="https://cdn.example.org/a.js"></script></body>')
    code, lines = check(site(tmp_path, page, "@font-face { src: url(//fonts.example.org/a.woff2) }"))
    assert code == 1
    assert lines == [
        "index.html: loads https://cdn.example.org/a.js",
        "_static/a.css: loads //fonts.example.org/a.woff2",
    ]


def test_an_empty_folder_is_no_site(tmp_path) -> None:
    assert check(tmp_path)[0] == 1
