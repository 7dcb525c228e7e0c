"""Pages whose Python blocks run from the first to the last, as a reader would run them."""

import pytest
import torch
from doc_examples import examples, run


@pytest.mark.slow
@pytest.mark.parametrize("page", ["attention.md", "models.md"])
def test_all_blocks_of_a_page_run_in_their_order(page: str, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = examples(page)
    assert len(blocks) > 3
    with torch.no_grad():
        run(blocks)
