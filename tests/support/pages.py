"""What is in an HTML page."""

import re
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path


@dataclass
class Parsed:
    """Contents of a page.

    Attributes:
        headings: Texts of h1, h2 and h3.
        images: Sources of pictures.
        captions: Captions of pictures.
        links: Addresses of links, scripts and styles outside of the page.
        policy: What the page may load.
        num_scripts: Scripts that run.
        shares: Widths of the bars of scores.
        text: All text.
        num_bytes: Size of the file.
    """

    headings: list[str] = field(default_factory=list)
    images: list[str] = field(default_factory=list)
    captions: list[str] = field(default_factory=list)
    links: list[str] = field(default_factory=list)
    policy: str = ""
    num_scripts: int = 0
    shares: list[str] = field(default_factory=list)
    text: str = ""
    num_bytes: int = 0


class _Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.page = Parsed()
        self.open: list[str] = []

    def handle_starttag(self, tag, attrs) -> None:
        given = dict(attrs)
        if tag not in {"meta", "img", "br", "input", "link"}:
            self.open.append(tag)
        if tag == "img":
            self.page.images.append(given["src"])
        if tag == "script":
            self.page.num_scripts += given.get("type") != "application/json"
        if given.get("http-equiv") == "Content-Security-Policy":
            self.page.policy = given["content"]
        if (share := re.search("--share:([^;]+)", given.get("style") or "")) is not None:
            self.page.shares.append(share[1])
        address = given.get("href") or (given.get("src") if tag != "img" else None)
        if address is not None and not address.startswith("#"):
            self.page.links.append(address)

    def handle_endtag(self, tag) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data) -> None:
        self.page.text += data
        if self.open and self.open[-1] in {"h1", "h2", "h3"}:
            self.page.headings.append(data)
        if self.open and self.open[-1] == "figcaption":
            self.page.captions.append(data.strip())


def parsed(path: Path) -> Parsed:
    """Read a page whose elements are all closed."""
    reader = _Reader()
    text = path.read_text(encoding="utf-8")
    reader.feed(text)
    assert reader.open == []
    reader.page.num_bytes = len(text.encode())
    return reader.page
