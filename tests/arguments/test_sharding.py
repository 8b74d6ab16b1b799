"""What `--fsdp` and `--deepspeed` come to, in the words of other tools."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from swiftlite.arguments.parser import parse
from swiftlite.arguments.train import SftArguments
from swiftlite.utils.errors import UsageError


@pytest.mark.parametrize(
    ("words", "found"),
    [
        ([], []),
        (["--fsdp", "fsdp2"], ["full_shard"]),
        (["--fsdp", "full_shard auto_wrap"], ["full_shard"]),
        (["--fsdp", "full_shard", "auto_wrap", "offload"], ["full_shard", "offload"]),
        (["--fsdp", "shard_grad_op"], ["shard_grad_op"]),
        (["--fsdp", "none"], []),
        (["--deepspeed", "zero0"], []),
        (["--deepspeed", "zero1"], ["shard_grad_op"]),
        (["--deepspeed", "zero2_offload"], ["shard_grad_op", "offload"]),
        (["--deepspeed", "zero3"], ["full_shard"]),
        (["--deepspeed", "zero3_offload"], ["full_shard", "offload"]),
    ],
)
def test_words(words: list[str], found: list[str]) -> None:
    assert parse(SftArguments, words).fsdp == found


@pytest.mark.parametrize(
    ("zero", "found"),
    [
        ({"stage": 3}, ["full_shard"]),
        ({"stage": 2, "offload_optimizer": {"device": "cpu"}}, ["shard_grad_op", "offload"]),
        ({"stage": 3, "offload_param": {"device": "none"}}, ["full_shard"]),
        ({}, []),
    ],
)
def test_a_file_of_deepspeed(zero: dict[str, object], found: list[str], tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({"bf16": {"enabled": "auto"}, "zero_optimization": zero}))
    assert parse(SftArguments, ["--deepspeed", str(path)]).fsdp == found


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--fsdp", "hybrid_shard"], "--fsdp hybrid_shard: must be full_shard or shard_grad_op"),
        (["--deepspeed", "zero4"], "--deepspeed zero4: must be one of zero0"),
        (["--deepspeed", "absent.json"], "--deepspeed absent.json: is no configuration"),
        (["--deepspeed", "zero3", "--fsdp", "shard_grad_op"], "leave out one"),
        (["--fsdp", "full_shard", "--optim", "paged_adamw"], "cannot be divided; use adamw_torch"),
        (["--fsdp", "full_shard", "--train_type", "lora", "--init_weights", "pissa"], "divides plain LoRA alone"),
        (["--fsdp", "full_shard", "--fp16", "true"], "use --torch_dtype bfloat16"),
        (["--fsdp", "full_shard", "--device_map", "auto"], "leave out one"),
        (["--sequence_parallel_size", "2", "--neftune_noise_alpha", "5"], "of whole sequences"),
    ],
)
def test_refusals(words: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse(SftArguments, words)
