"""What was found on this machine, and the table of shims."""

from __future__ import annotations

import torch

from swiftlite.megatron import backend


def test_shims_are_explained_and_reported() -> None:
    for shim in backend.SHIMS:
        assert shim.reason
        assert shim.gone
        assert shim.versions[:4] in ("0.16", "0.17", "0.18", "0.19")
    applied = backend.setup().shims
    assert set(applied) <= {shim.name for shim in backend.SHIMS}
    assert backend.setup() is backend.setup()
    if not torch.cuda.is_available():
        assert {"cpu_for_cuda", "bucket_padding"} <= set(applied)
        assert "gloo" in backend.setup().describe()
        assert torch.cuda.current_device.__module__ == "torch.cuda", "torch itself is left alone"
