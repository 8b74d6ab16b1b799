"""How far FP8 weights are from what they were made of, for each form: the table of docs/fp8.md. About ten seconds.

`python benchmarks/fp8_error.py`
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file

from swiftlite.weights.fp8 import from_stored
from swiftlite.weights.quantise import FORMS, Quantised
from swiftlite.weights.safetensors import SafetensorsSource
from swiftlite.weights.storage import Files, read_tensor

ROWS, COLUMNS = 2000, 3000  # the last blocks are cut


def weights() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    normal = torch.randn(ROWS, COLUMNS) * 0.02
    tails = torch.distributions.StudentT(4.0).sample((ROWS, COLUMNS)) * 0.02
    rows = normal * 10 ** (0.5 * torch.randn(ROWS, 1))  # rows of different size
    return {"normal": normal, "heavy tails (t, 4)": tails, "rows of sizes 10^(0.5 z)": rows}


def main() -> None:
    print(
        "| weights | form | rms error / rms | of the worst row | largest error / largest of its row | bytes a number |"
    )
    print("|---|---|---|---|---|---|")
    for what, weight in weights().items():
        weight = weight.bfloat16()
        with tempfile.TemporaryDirectory() as folder, Files() as files:
            save_file({"w": weight}, Path(folder) / "model.safetensors")
            for form in FORMS:
                source = Quantised(SafetensorsSource(Path(folder)), ["w"], form)
                codes, scales = (read_tensor(source, name, files) for name in ("w", *source.scaled))
                grid = from_stored(scales).reshape(source.grid(weight.shape))
                values = codes.float() * source.spread("w", grid, 0, 0, weight.shape)
                error, exact = (values - weight.float()).abs(), weight.float()
                rms = error.square().mean().sqrt() / exact.square().mean().sqrt()
                worst = (error.square().mean(1).sqrt() / exact.square().mean(1).sqrt()).max()
                largest = (error.amax(1) / exact.abs().amax(1)).max()
                size = (codes.nbytes + scales.nbytes) / codes.numel()
                print(f"| {what} | {form} | {rms:.2%} | {worst:.2%} | {largest:.2%} | {size:.4f} |")


if __name__ == "__main__":
    main()
