"""Operations by the formula are those that torch counts; attention, experts and adapters by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from swiftlite.families.hf_config import convert_hf_config
from swiftlite.train.flops import ModelFlops, attention_pairs, model_flops, peak_flops
from swiftlite.weights.shape import ModelShape
from tests.families.cases import config_of

CASES = ["llama:mha", "qwen2:tied", "qwen3:default", "qwen2_moe:sparse_step2", "qwen3_moe:mlp_only", "glm4_5:default",
         "moonlight:default", "deepseek_v2:grouped_ratio2", "dots1:default", "ernie:default", "ernie:no_shared"]  # fmt: skip
TOKENS, ROWS = 16, 2


def build(case: str, directory: Path) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    (directory / "config.json").write_text(json.dumps(config_of(case)))
    torch.manual_seed(0)
    # Plain attention computes the whole square, and the counter sees its matrices.
    model = AutoModelForCausalLM.from_config(
        AutoConfig.from_pretrained(directory), dtype=torch.float32, attn_implementation="eager"
    )
    if hasattr(model, "set_experts_implementation"):  # transformers 5: experts in a loop, so no padding
        model.set_experts_implementation("eager")
    return model


def counted(model: Any, backward: bool) -> int:
    with FlopCounterMode(display=False) as counter:
        loss = model(input_ids=torch.randint(3, 300, (ROWS, TOKENS)), use_cache=False).logits.sum()
        if backward:
            loss.backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("case", CASES)
def test_formula_counts_what_torch_counts(case: str, tmp_path: Path) -> None:
    model, flops = build(case, tmp_path), model_flops(config_of(case))
    square = ROWS * TOKENS * TOKENS
    # 1e-3: transformers 4 multiplies rotary frequencies as matrices, too.
    assert counted(model, False) == pytest.approx(flops.forward(ROWS * TOKENS, square), rel=1e-3)
    assert counted(model, True) == pytest.approx(flops.training(ROWS * TOKENS, square), rel=1e-3)


def test_adapters(tmp_path: Path) -> None:
    """Frozen matrices are passed through, adapters are trained. Nothing flows back out of the first layer."""
    from peft import LoraConfig, get_peft_model

    from swiftlite.llm.model.tuner import trained_weights

    config = config_of("qwen3:default")
    model = get_peft_model(build("qwen3:default", tmp_path), LoraConfig(r=4, target_modules=["q_proj", "down_proj"]))
    flops = model_flops(config)
    kind = trained_weights(model, flops)
    assert kind == {"trained": 0.0, "adapters": sum(p.numel() for n, p in model.named_parameters() if "lora_" in n)}
    square = ROWS * TOKENS * TOKENS
    expected = flops.training(ROWS * TOKENS, square, **kind)
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    dim, groups = config["head_dim"], config["num_key_value_heads"]
    first = hidden * dim * (heads + 2 * groups) + 4 * hidden  # input gradients of the first q, k, v and of one A
    # k and v of the first layer need no gradients at all, so neither do their shares of the attention's backward pass
    first_attention = 2 * square * heads * dim * 2
    measured = counted(model, True)
    assert measured == pytest.approx(expected - 2 * first * ROWS * TOKENS - first_attention, rel=1e-3)
    assert measured == pytest.approx(expected, rel=0.2)


def test_causal_attention_is_half_the_square() -> None:
    assert attention_pairs([1, 3]) == 1 + 6
    assert attention_pairs([4096]) / 4096**2 == pytest.approx(0.5, rel=1e-3)


def test_a_window_bounds_the_keys() -> None:
    """Counted one by one; layers with a window and without one count by their number."""
    lengths, window = [1, 3, 4, 5, 90], 4
    by_hand = sum(min(i + 1, window) for n in lengths for i in range(n))
    assert attention_pairs(lengths, window) == by_hand
    flops = ModelFlops(0, attention=12, window=window, window_share=2 / 3)
    assert flops.pairs(lengths) == pytest.approx((2 * by_hand + attention_pairs(lengths)) / 3)
    mistral = model_flops(config_of("mistral:window"))
    assert (mistral.window, mistral.window_share) == (37, 1.0)
    assert mistral.pairs([500]) == attention_pairs([500], 37)
    assert model_flops(config_of("mistral:default")).pairs([500]) == attention_pairs([500])


def test_known_models() -> None:
    """6 operations per parameter and token, of experts the chosen ones."""
    air = {
        "architectures": ["Glm4MoeForCausalLM"],
        "hidden_size": 4096, "intermediate_size": 10944, "num_hidden_layers": 46, "num_attention_heads": 96,
        "num_key_value_heads": 8, "head_dim": 128, "n_routed_experts": 128, "n_shared_experts": 1,
        "num_experts_per_tok": 8, "moe_intermediate_size": 1408, "first_k_dense_replace": 1, "vocab_size": 151552,
    }  # fmt: skip
    active = model_flops(air).linear / 2
    assert 12e9 < active < 13.5e9, "GLM-4.5-Air: 12 B active (the embedding's look-up is free, the head is not)"
    assert model_flops(air).expert_share == 8 / 128
    assert sum(ModelShape.from_config(convert_hf_config(air)).moe_layers) == 45
    assert model_flops(air).training(1, 0) == 6 * active
    mtp, plain = model_flops(air, mtp_layers=2), model_flops(air)
    hidden, vocabulary = 4096, 151552
    attention = hidden * 128 * (2 * 96 + 2 * 8)
    block = attention + 3 * hidden * 1408 * (8 + 1) + hidden * 128 + 2 * hidden**2 + hidden * vocabulary
    assert mtp.linear - plain.linear == 2 * 2 * block, "each has a layer with experts, a projection and the head"
    assert mtp.attention / plain.attention == 48 / 46
    assert ModelFlops(10, 1).training(2, 3, references=1) == 3 * (10 * 2 + 3) + 23


@pytest.mark.parametrize(
    "name, peak",
    [("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA H100 PCIe", 756e12), ("NVIDIA H200", 989e12), ("NVIDIA H20", 148e12),
     ("NVIDIA A100-SXM4-80GB", 312e12), ("NVIDIA A10G", 70e12), ("NVIDIA L40S", 362e12), ("Some new device", None)],
)  # fmt: skip
def test_peaks(name: str, peak: float | None) -> None:
    assert peak_flops(name) == peak
