"""What `--fsdp` and `--deepspeed` come to, in the words of other tools."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from swiftlite.arguments.megatron_train import MegatronSftArguments
from swiftlite.arguments.parser import from_dict, given_values, parse
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
        (["--fsdp", "fsdp2_offload"], ["full_shard", "offload"]),
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


# What other tools' files say, the words of --fsdp that come of it, and what --recompute becomes.
MS_SWIFT = {"fsdp_version": 2, "reshard_after_forward": True, "cpu_ram_efficient_loading": True}
ACCELERATE = {"fsdp_version": 2, "fsdp_state_dict_type": "FULL_STATE_DICT", "fsdp_offload_params": True}
FILES: list[tuple[dict[str, object], list[str], str | None]] = [
    (
        {"fsdp": "full_shard auto_wrap", "fsdp_config": {**MS_SWIFT, "activation_checkpointing": True}},
        ["full_shard"],
        "full",
    ),
    ({"fsdp": "full_shard", "fsdp_config": {**MS_SWIFT, "activation_cpu_offload": True}}, ["full_shard"], "full"),
    ({"fsdp": "full_shard auto_wrap offload", "fsdp_config": MS_SWIFT}, ["full_shard", "offload"], None),
    ({"distributed_type": "FSDP", "fsdp_config": ACCELERATE}, ["full_shard", "offload"], None),
    ({"fsdp_config": {"fsdp_sharding_strategy": "SHARD_GRAD_OP"}}, ["shard_grad_op"], None),
    ({"fsdp_config": {"fsdp_sharding_strategy": 3}}, [], None),
    ({"reshard_after_forward": False, "activation_checkpointing": "true"}, ["shard_grad_op"], "full"),
    ({"fsdp": ["full_shard"]}, ["full_shard"], None),
]


@pytest.mark.parametrize(("said", "found", "recompute"), FILES)
def test_files_of_fsdp(said: dict[str, object], found: list[str], recompute: str | None, tmp_path: Path) -> None:
    path = tmp_path / "fsdp 2.json"
    path.write_text(json.dumps(said))
    for words in (["--fsdp", str(path)], ["--fsdp_config", str(path)], ["--fsdp_config", json.dumps(said)]):
        args = parse(SftArguments, words)
        assert (args.fsdp, args.recompute) == (found, recompute)
        assert from_dict(SftArguments, given_values(args)).to_dict() == args.to_dict()
    assert parse(SftArguments, ["--fsdp", str(path), "--gradient_checkpointing", "false"]).recompute == "none"
    assert parse(SftArguments, ["--fsdp", "none", "--fsdp_config", str(path)]).fsdp == []
    assert parse(MegatronSftArguments, ["--model", "DIR", "--fsdp_config", str(path)]).fsdp == []


def test_words_and_a_file_of_fsdp_belong_together(caplog: pytest.LogCaptureFixture) -> None:
    args = parse(SftArguments, ["--fsdp", "full_shard auto_wrap", "--fsdp_config", '{"reshard_after_forward": false}'])
    assert args.fsdp == ["shard_grad_op"]
    parse(SftArguments, ["--recompute", "none", "--fsdp_config", '{"version": 2, "activation_cpu_offload": true}'])
    assert "activations stay on the GPU, --recompute full would save them" in caplog.text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--fsdp", "hybrid_shard"], "--fsdp hybrid_shard: must be full_shard or shard_grad_op"),
        (["--deepspeed", "zero4"], "--deepspeed zero4: must be one of zero0"),
        (["--deepspeed", "absent.json"], "--deepspeed absent.json: is no configuration"),
        (["--deepspeed", "zero3", "--fsdp", "shard_grad_op"], "leave out one"),
        (["--fsdp", "absent.json"], "--fsdp absent.json: is no configuration of FSDP .*No such file"),
        (["--fsdp_config", '{"zero_optimization": {}}'], "has none of sharding_strategy"),
        (["--fsdp_config", '{"fsdp_config": 3}'], "must be an object"),
        (
            ["--fsdp_config", '{"sharding_strategy": "HYBRID_SHARD"}'],
            "sharding_strategy HYBRID_SHARD: must be full_shard",
        ),
        (["--fsdp_config", '{"fsdp": "hybrid_shard"}'], "--fsdp hybrid_shard: must be"),
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
