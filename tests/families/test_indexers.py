"""Attention that reads the tokens an indexer chooses: dense on Megatron up to as many tokens, the indexer carried."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from swiftlite.checkpoint.bind import bind_map
from swiftlite.cli.main import main
from swiftlite.selftest.precision import check_precision
from tests.families.cases import CASES, build_hf, config_of
from tests.families.test_round_trip import to_mcore

pytestmark = pytest.mark.skipif("glm_moe_dsa:default" not in CASES, reason="transformers has no such model")
CHAT = "{% for m in messages %}{{ m.role }}: {{ m.content }}<|im_end|>{% endfor %}"


def indexed(**change: Any) -> list[int]:
    """Layers with an indexer."""
    names = bind_map({**config_of("glm_moe_dsa:shared"), **change}).by_hf
    return [layer for layer in range(5) if f"model.layers.{layer}.self_attn.indexer.wk.weight" in names]


def test_layers_with_an_indexer() -> None:
    assert indexed() == [0, 1, 3]
    assert indexed(index_topk_freq=3) == [0, 1, 4]
    assert indexed(index_topk_pattern="FSFSS") == [0, 2]
    assert indexed(indexer_types=["full", "shared", "shared", "full", "shared"]) == [0, 3]
    assert indexed(index_topk_freq=1) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("case", ["deepseek_v3_2:default", "glm_moe_dsa:shared"])
def test_the_check_gives_no_more_tokens_than_are_chosen(case: str, tmp_path: Path) -> None:
    build_hf({**config_of(case), "index_topk": 60}, tmp_path / "hf")
    to_mcore(tmp_path / "hf", tmp_path / "mcore")
    assert check_precision(tmp_path / "hf", tmp_path / "mcore").num_tokens == 60


def test_trained_up_to_as_many_tokens(
    tmp_path: Path, tiny_tokenizer_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Both sides alike; every checkpoint has the indexers as they were."""
    hf = tmp_path / "hf"
    build_hf({**config_of("glm_moe_dsa:default"), "index_topk": 64}, hf)
    for file in tiny_tokenizer_dir.iterdir():
        shutil.copy(file, hf)
    (hf / "chat_template.jinja").write_text(CHAT)
    row = {"messages": [{"role": "user", "content": "Who are you?"}, {"role": "assistant", "content": "Swifty."}]}
    (tmp_path / "data.jsonl").write_text(f"{json.dumps(row)}\n" * 4)
    words = ["--model", str(hf), "--dataset", str(tmp_path / "data.jsonl"), "--train_iters", "2", "--global_batch_size", "2",
             "--micro_batch_size", "2", "--lr", "1e-2", "--torch_dtype", "float32", "--logging_steps", "1",
             "--save_weights_only", "true"]  # fmt: skip
    mega, llm, back = (tmp_path / name for name in ("mega", "llm", "back"))
    assert main(["megatron", "sft", *words, "--max_length", "65", "--output_dir", str(mega)]) == 2
    assert "a token of this model sees 64 tokens that an indexer chooses" in capsys.readouterr().err
    words += ["--max_length", "64"]
    assert main(["megatron", "sft", *words, "--save_safetensors", "true", "--output_dir", str(mega)]) == 0
    assert main(["sft", *words, "--output_dir", str(llm)]) == 0
    assert main(["export", "--mcore_model", str(mega), "--to_hf", "true", "--output_dir", str(back)]) == 0
    logs = [
        [json.loads(line).get("loss") for line in (d / "logging.jsonl").read_text().splitlines()] for d in (mega, llm)
    ]
    assert [x for x in logs[0] if x] == pytest.approx([x for x in logs[1] if x], rel=1e-4)
    before = load_file(hf / "model.safetensors")
    for directory in (mega / "iter_0000002-hf", back, llm / "checkpoint-2"):
        after = load_file(directory / "model.safetensors")
        assert after.keys() == before.keys()
        for name, tensor in before.items():
            if ".indexer." in name:
                assert torch.equal(after[name], tensor), f"{name} in {directory}"
        assert not torch.equal(after["lm_head.weight"], before["lm_head.weight"])
