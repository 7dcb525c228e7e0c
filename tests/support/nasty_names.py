"""Names of classes, bands and files that break what parses text: markup, formats, tables, encodings."""

NASTY_NAMES = (
    "[bold]",
    "[/]",
    "[red]x",
    ":smile:",
    "a,b",
    '"q"',
    "it's",
    "$x_1$",
    "$\\frac$",
    "_hidden",
    "%s",
    "{x}",
    "#1",
    "a;b!c?d",
    "<b>&amp;",
    "ä",
    "漢",
    "🌳",
    "-dash",
    "x ",
    "n" * 200,
)
"""Each can be a class, a band and the stem of a file."""

UNSEEN_NAMES = {"a\nb": r"a\nb", "a\tb": r"a\tb", "\x1b[31mred": r"\x1b[31mred", "\u202eabc": r"\u202eabc"}
"""Names with characters that nobody sees, and how they are shown."""
