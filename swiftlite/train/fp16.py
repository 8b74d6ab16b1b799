"""The loss scale of fp16 training, the same on both sides. Imports nothing heavy.

Gradients in fp16 overflow where the loss is scaled too high: such a step updates nothing, lowers the scale, and leaves
the learning rate where it is. Its samples are not trained on again in this epoch.
"""

from __future__ import annotations

from swiftlite.utils.errors import SwiftliteError
from swiftlite.utils.logger import get_logger

# As torch.amp.GradScaler has them: halved at each overflow, doubled after so many steps without one.
INITIAL_SCALE = 2.0**16
GROWTH_INTERVAL = 2000
LOWEST_SCALE = 1.0
# By how much gradients may grow after the batch that a first scale was found on, without an overflow.
HEADROOM = 4.0


def say_skipped(step: int, scale: float, skipped: int) -> None:
    """Tell of a step that updated nothing. scale: of its loss. skipped: such steps of the run so far.

    Raises: SwiftliteError where the loss was not scaled up any more, so that the gradients themselves overflow.
    """
    if scale <= LOWEST_SCALE:
        raise SwiftliteError(
            f"step {step}: the gradients overflow fp16 with a loss scale of {scale:g}; training has diverged, or the model "
            "is made for bf16: use --torch_dtype bfloat16, or lower --lr, and start again from the last checkpoint"
        )
    get_logger().warning(
        "step %d: the gradients overflow fp16 with a loss scale of %g, so nothing is updated and the learning rate stays "
        "(skipped steps so far: %d)", step, scale, skipped,
    )  # fmt: skip
