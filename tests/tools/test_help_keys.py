"""tools/help_keys.py: the help of `train` lists the keys that configs have."""

import importlib
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_keys_of_the_help_are_up_to_date(monkeypatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    help_keys = importlib.import_module("help_keys")
    assert help_keys.FILE.read_text(encoding="utf-8") == help_keys.text(), "run: python tools/help_keys.py"
