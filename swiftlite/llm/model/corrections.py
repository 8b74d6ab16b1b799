"""Where a release of transformers computes a model otherwise than its authors do: put right after the model is built.

Without this the same checkpoint would give other logits with other releases. Imports nothing heavy.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any


def _yarn_softmax_scale(model: Any) -> None:
    """DeepSeek-V2 multiplies the softmax scale by yarn's factor squared, as V3 does; transformers did not at first."""
    scaling = getattr(model.config, "rope_scaling", None) or {}
    all_dim = scaling.get("mscale_all_dim") or 0
    factor = 0.1 * all_dim * math.log(scaling["factor"]) + 1 if all_dim and scaling["factor"] > 1 else 1.0
    for module in model.modules():
        if hasattr(module, "qk_head_dim") and hasattr(module, "scaling"):
            module.scaling = module.qk_head_dim**-0.5 * factor**2


# Class of transformers -> correction. Each sets values rather than scaling them, so that releases which are right stay so.
CORRECTIONS: Mapping[str, Callable[[Any], None]] = {
    "DeepseekV2ForCausalLM": _yarn_softmax_scale,  # 4.57 to 5.0; goes when the oldest supported release has mscale
}


def correct(model: Any) -> Any:
    """Return `model`, corrected in place where its class needs it. Safe to call twice."""
    correction = CORRECTIONS.get(type(model).__name__)
    if correction is not None:
        correction(model)
    return model
