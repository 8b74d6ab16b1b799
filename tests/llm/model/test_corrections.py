"""Models compute the same with every supported release of transformers."""

from __future__ import annotations

import copy
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


def test_experts_take_the_dtype_of_autocast(tmp_path: Path) -> None:
    """Weights in fp32 and the same ones rounded to bf16 give one output, and the fp32 ones get a gradient in fp32."""
    model = correct(build_hf(config_of("qwen3_moe:default"), tmp_path))
    mlp = model.model.layers[-1].mlp.experts
    own = list(mlp.parameters())
    rounded = copy.deepcopy(mlp)
    for parameter in rounded.parameters():
        parameter.data = parameter.data.bfloat16()
    x = torch.randn(6, model.config.hidden_size)
    chosen = torch.tensor([[0, 1]]).expand(6, 2)
    with torch.autocast("cpu", torch.bfloat16):
        if isinstance(mlp, torch.nn.ModuleList):  # transformers 4 has a module for each expert
            outputs = [experts[1](x.bfloat16()) for experts in (mlp, rounded)]
        else:
            outputs = [experts(x.bfloat16(), chosen, torch.full((6, 2), 0.5)) for experts in (mlp, rounded)]
    assert torch.equal(*outputs)
    outputs[0].float().sum().backward()
    assert {p.grad.dtype for p in own if p.grad is not None} == {torch.float32} and list(mlp.parameters()) == own


def test_other_models_are_left_alone() -> None:
    model = torch.nn.Linear(2, 2)
    before = dict(vars(model))
    assert correct(model) is model
    assert vars(model) == before
