"""Models compute the same with every supported release of transformers."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from swiftlite.llm.model.corrections import correct
from tests.families.cases import build_hf, config_of

YARN = {"type": "yarn", "factor": 4, "original_max_position_embeddings": 64, "mscale": 1.0, "mscale_all_dim": 0.5}


@pytest.mark.parametrize(("scaling", "factor"), [(YARN, (0.05 * math.log(4) + 1) ** 2), (None, 1.0)])
def test_softmax_scale_of_deepseek_v2(scaling: dict[str, float] | None, factor: float, tmp_path: Path) -> None:
    """softmax_scale of the published modeling_deepseek.py: q_head_dim**-0.5 * yarn_get_mscale(factor, all_dim)**2."""
    config = config_of("deepseek_v2:default")
    width = config["qk_nope_head_dim"] + config["qk_rope_head_dim"]
    model = correct(build_hf({**config, "rope_scaling": scaling}, tmp_path))  # a second time: nothing piles up
    scales = [layer.self_attn.scaling for layer in model.model.layers]
    assert scales == [pytest.approx(width**-0.5 * factor, rel=1e-12)] * config["num_hidden_layers"]


def test_a_negative_bias_keeps_the_choice_within_the_best_groups(tmp_path: Path) -> None:
    """Adding one number to every expert's bias changes no choice."""
    model = correct(build_hf(config_of("deepseek_r1:default"), tmp_path))
    tokens, logits = torch.arange(24)[None], []
    for shift in (0.0, -3.0):
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer += shift
        with torch.no_grad():
            logits.append(model(tokens).logits)
    torch.testing.assert_close(logits[0], logits[1])


def test_other_models_are_left_alone() -> None:
    model = torch.nn.Linear(2, 2)
    before = dict(vars(model))
    assert correct(model) is model
    assert vars(model) == before
