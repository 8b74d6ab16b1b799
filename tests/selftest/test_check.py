"""`swiftlite check`: real configs shrink to models that keep their traits, and the command judges them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from swiftlite.checkpoint.bind import convert_hf_config
from swiftlite.cli.main import main
from swiftlite.selftest import check
from swiftlite.selftest.shrink import shrink_config

AIR = json.loads((Path(__file__).parents[1] / "golden/glm4_5_air/config.json").read_text())
DEEPSEEK_V3: dict[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "hidden_size": 7168,
    "intermediate_size": 18432, "moe_intermediate_size": 2048, "num_hidden_layers": 61, "num_attention_heads": 128,
    "num_key_value_heads": 128, "n_shared_experts": 1, "n_routed_experts": 256, "routed_scaling_factor": 2.5,
    "kv_lora_rank": 512, "q_lora_rank": 1536, "qk_rope_head_dim": 64, "v_head_dim": 128, "qk_nope_head_dim": 128,
    "n_group": 8, "topk_group": 4, "num_experts_per_tok": 8, "first_k_dense_replace": 3, "norm_topk_prob": True,
    "hidden_act": "silu", "max_position_embeddings": 163840, "rms_norm_eps": 1e-6, "rope_theta": 10000,
    "rope_scaling": {"beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 1.0, "mscale_all_dim": 1.0,
                     "original_max_position_embeddings": 4096, "type": "yarn"},
    "attention_bias": False, "vocab_size": 129280, "num_nextn_predict_layers": 1, "tie_word_embeddings": False,
}  # fmt: skip

GLM4: dict[str, Any] = {  # its class's pad token is beyond a small vocabulary
    "architectures": ["Glm4ForCausalLM"], "model_type": "glm4", "attention_bias": True, "head_dim": 128,
    "hidden_act": "silu", "hidden_size": 4096, "intermediate_size": 13696, "max_position_embeddings": 32768,
    "num_attention_heads": 32, "num_hidden_layers": 40, "num_key_value_heads": 2, "pad_token_id": 151329,
    "partial_rotary_factor": 0.5, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": False,
    "vocab_size": 151552,
}  # fmt: skip
MINIMAX_M2: dict[str, Any] = {
    "architectures": ["MiniMaxM2ForCausalLM"], "model_type": "minimax_m2", "attn_type_list": [1] * 62, "head_dim": 128,
    "hidden_act": "silu", "hidden_size": 3072, "intermediate_size": 1536, "max_position_embeddings": 196608,
    "num_attention_heads": 48, "num_experts_per_tok": 8, "num_hidden_layers": 62, "num_key_value_heads": 8,
    "num_local_experts": 256, "num_mtp_modules": 3, "qk_norm_type": "per_layer", "rms_norm_eps": 1e-6,
    "rope_theta": 5000000, "rotary_dim": 64, "scoring_func": "sigmoid", "shared_intermediate_size": 0,
    "tie_word_embeddings": False, "use_mtp": True, "use_qk_norm": True, "use_routing_bias": True, "vocab_size": 200064,
    "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]},
}  # fmt: skip
HUNYUAN: dict[str, Any] = {  # with dropout, and lists of each layer's numbers
    "architectures": ["HunYuanMoEV1ForCausalLM"], "model_type": "hunyuan_v1_moe", "attention_bias": False,
    "attention_dropout": 0.1, "head_dim": 128, "hidden_act": "silu", "hidden_size": 4096, "intermediate_size": 3072,
    "max_position_embeddings": 32768, "mlp_bias": False, "moe_intermediate_size": [3072] * 32, "moe_topk": [8] * 32,
    "num_attention_heads": 32, "num_experts": 64, "num_hidden_layers": 32, "num_key_value_heads": 8,
    "num_shared_expert": [1] * 32, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": True,
    "rope_scaling": {"alpha": 1000.0, "beta_fast": 32, "beta_slow": 1, "factor": 1.0, "mscale": 1.0,
                     "mscale_all_dim": 1.0, "type": "dynamic"},
    "use_cla": False, "use_qk_norm": True, "vocab_size": 128167,
}  # fmt: skip


@pytest.mark.parametrize(
    "config",
    [AIR, DEEPSEEK_V3, GLM4, MINIMAX_M2, HUNYUAN],
    ids=["GLM-4.5-Air", "DeepSeek-V3", "GLM-4-9B-0414", "MiniMax-M2", "Hunyuan-A13B"],
)
def test_real_configs_shrink_and_pass(config: dict[str, Any]) -> None:
    small = shrink_config(config)
    before, after = convert_hf_config(config), convert_hf_config(small)
    assert set(before) == set(after)
    sizes = {"num_layers", "hidden_size", "num_attention_heads", "padded_vocab_size", "num_experts"}
    assert all(after[k] < before[k] for k in sizes & set(before))
    kept = {k: v for k, v in before.items() if isinstance(v, bool | str) and k != "moe_layer_freq"}
    assert kept == {k: after[k] for k in kept}
    result = check.check_config("small", small)
    assert result.logits_error <= 1e-5 and result.gradient_error <= 1e-4


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text(json.dumps(AIR))
    assert main(["check", "--model", str(tmp_path)]) == 0
    assert "tensors back bit for bit" in capsys.readouterr().err
    assert main(["check", "--model_type", "qwen4"]) == 2
    assert "qwen3" in capsys.readouterr().err
    assert main(["check"]) == 2


def test_a_wrong_map_fails(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """gate and up exchanged in the weight map itself: bytes still come back, logits tell."""
    from swiftlite.weights.ops import ConcatRows

    original = ConcatRows.segments
    monkeypatch.setattr(ConcatRows, "segments", lambda *a: tuple(reversed(original(*a))))
    assert main(["check", "--model_type", "qwen3"]) == 1
    assert "layer 0 is off" in capsys.readouterr().err
