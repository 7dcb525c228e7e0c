"""Check a built documentation site: python tools/check_site.py docs/_build/html.

Every link to a page, anchor, picture or file of the site must have its target, and no page may load a script, style
sheet, font or picture from elsewhere, so that the site works offline. Links to other sites are not fetched.
"""

import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

# Attributes that load or link to a file.
_LOADED = {("img", "src"), ("script", "src"), ("link", "href"), ("source", "src"), ("iframe", "src"), ("video", "src")}
# Links to the site's own address and to other formats of a page.
_NOT_LOADED = {"canonical", "alternate"}
_IN_STYLES = re.compile(r"url\(\s*['\"]?([^'\")]+)")


class Page(HTMLParser):
    """Anchors, links and loaded files of a page.

    Attributes:
        anchors: Values of `id` and `name`.
        links: Targets of `<a href>`.
        loaded: Addresses of scripts, style sheets and pictures.
    """

    def __init__(self, text: str) -> None:
        super().__init__()
        self.anchors: set[str] = set()
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Collect what a tag names, links to or loads."""
        given = {name: value for name, value in attrs if value is not None}
        self.anchors |= {given[name] for name in ("id", "name") if name in given}
        if tag == "a" and "href" in given:
            self.links.append(given["href"])
        if given.get("rel") not in _NOT_LOADED:
            self.loaded += [value for name, value in given.items() if (tag, name) in _LOADED]


def problems_of_site(root: Path) -> list[str]:
    """One line for each broken link and each file from elsewhere.

    Args:
        root: Folder of the built site.
    """
    pages = {path.resolve(): Page(path.read_text(encoding="utf-8")) for path in _pages(root)}
    found = []
    for path, page in pages.items():
        name = path.relative_to(root.resolve())
        found += [f"{name}: loads {each}" for each in page.loaded if _is_elsewhere(each)]
        targets = dict.fromkeys([*page.links, *page.loaded])
        found += [f"{name}: no target of {each}" for each in targets if not _exists(each, path, pages)]
    for path in sorted(root.rglob("*.css")):
        styles = path.read_text(encoding="utf-8")
        loads = [each for each in _IN_STYLES.findall(styles) if _is_elsewhere(each)]
        found += [f"{path.relative_to(root)}: loads {each}" for each in loads]
    return found


def _pages(root: Path) -> list[Path]:
    # _static also holds templates of the theme.
    return [path for path in sorted(root.rglob("*.html")) if path.relative_to(root).parts[0] != "_static"]


def _is_elsewhere(target: str) -> bool:
    parts = urlsplit(target)
    return bool(parts.netloc) or parts.scheme in {"http", "https"}


def _exists(target: str, path: Path, pages: dict[Path, Page]) -> bool:
    parts = urlsplit(target)
    if parts.scheme or parts.netloc:
        return True
    file = (path.parent / unquote(parts.path)).resolve() if parts.path else path
    if file.is_dir():
        file /= "index.html"
    if not file.exists():
        return False
    return not parts.fragment or file not in pages or unquote(parts.fragment) in pages[file].anchors


def main(root: Path) -> int:
    """Print the problems of a site; return the exit code."""
    found = problems_of_site(root)
    num_pages = len(_pages(root))
    print("\n".join(found) or f"{num_pages} pages, all links lead somewhere")
    return 1 if found or not num_pages else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
