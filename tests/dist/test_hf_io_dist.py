"""Live load and save under TP, PP, EP and their mixtures: each rank's shard is the offline slice, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from swiftlite.llm.model import reference
from tests.dist.launch import run_cases
from tests.families.cases import build_hf, config_of
from tests.families.test_round_trip import to_mcore

reference.register()
CASES: dict[str, dict[str, Any]] = {
    "qwen2_5:default": {"vocab_size": 333},  # dense, tied, odd vocabulary
    "llama3_1:default": {"num_hidden_layers": 4, "vocab_size": 333},
    "qwen3_moe:default": {},
    "glm4_5:default": {"num_hidden_layers": 4},  # MoE with MTP
    "deepseek_r1:default": {"num_hidden_layers": 4},  # MLA with MTP
    "ernie:default": {},
    "glm4_0414:default": {"num_key_value_heads": 2},  # post norms, gate and up in one matrix
    "olmo2:default": {"num_key_value_heads": 2},  # no input norms, q/k norms over all heads
    "gpt_oss:default": {"num_key_value_heads": 2},  # experts in one tensor, transposed, gate and up in turns
}
TP2 = {"tensor_model_parallel_size": 2}
PP2 = {"pipeline_model_parallel_size": 2}
EP2 = {"expert_model_parallel_size": 2, "expert_tensor_parallel_size": 1}
LAYOUTS: dict[int, dict[str, list[dict[str, Any]]]] = {
    2: {
        "qwen2_5:default": [TP2, {**PP2, "decoder_first_pipeline_num_layers": 1}],
        "llama3_1:default": [TP2, PP2, {**PP2, "num_virtual_stages_per_pipeline_rank": 2}],
        "qwen3_moe:default": [TP2, EP2, PP2],
        "glm4_5:default": [{}, TP2, EP2, PP2, {**TP2, "mtp_num_layers": 1}],  # {}: two data-parallel ranks
        "deepseek_r1:default": [TP2, EP2, PP2, {**EP2, "mtp_num_layers": 1}],
        "ernie:default": [TP2, EP2],
        "glm4_0414:default": [TP2, {**PP2, "decoder_first_pipeline_num_layers": 1}],
        "olmo2:default": [TP2, {**PP2, "decoder_first_pipeline_num_layers": 1}],
        "gpt_oss:default": [TP2, EP2, {**PP2, "decoder_first_pipeline_num_layers": 1}],
    },
    4: {
        "llama3_1:default": [{**TP2, **PP2}],
        "glm4_5:default": [{**TP2, **EP2}, {**TP2, **PP2}, {**EP2, **PP2}],
        "gpt_oss:default": [{**TP2, **EP2}],
        "deepseek_r1:default": [{**TP2, **EP2}, {**TP2, **PP2, "mtp_num_layers": 1}],
    },
}


@pytest.mark.dist
@pytest.mark.parametrize("processes", LAYOUTS)
def test_every_rank_holds_the_offline_slice(processes: int, tmp_path: Path) -> None:
    cases: list[Any] = []
    for case, layouts in LAYOUTS[processes].items():
        root = tmp_path / case.replace(":", "-")
        build_hf({**config_of(case), **CASES[case]}, root / "hf")
        to_mcore(root / "hf", root / "mcore")
        cases += [[str(root), layout, str(root / f"saved-{number}")] for number, layout in enumerate(layouts)]
    code, log = run_cases(processes, cases, "tests.dist.worker_hf_io")
    assert code == 0, log[-4000:]
    assert log.count("ok ") == len(cases), log
