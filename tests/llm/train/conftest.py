"""What comparisons with trainers of other libraries share."""

from __future__ import annotations

import pytest
import transformers


@pytest.fixture(autouse=True)
def losses_are_not_rounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers 4 rounds a loss to four digits before it logs it."""
    if int(transformers.__version__.split(".")[0]) < 5:
        monkeypatch.setattr("transformers.trainer.round", lambda value, _: value, raising=False)
