"""What `benchmarks/gpu/run.py` runs: models, data and rows of its table."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

DENSE = {
    "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_size": 2048, "intermediate_size": 6144,
    "num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "hidden_act": "silu",
    "vocab_size": 151936, "max_position_embeddings": 8192, "rms_norm_eps": 1e-6, "rope_theta": 1000000,
    "tie_word_embeddings": False, "torch_dtype": "bfloat16",
}  # fmt: skip
MOE = {
    **DENSE, "architectures": ["Glm4MoeForCausalLM"], "model_type": "glm4_moe", "num_hidden_layers": 12,
    "attention_bias": True, "partial_rotary_factor": 0.5, "first_k_dense_replace": 1, "n_routed_experts": 32,
    "n_shared_experts": 1, "num_experts_per_tok": 4, "moe_intermediate_size": 1024, "n_group": 1, "topk_group": 1,
    "norm_topk_prob": True, "routed_scaling_factor": 1.0, "use_qk_norm": False,
}  # fmt: skip
# The layers of GLM-4.5-Air with fewer of them and of experts: what one GPU still trains.
AIR = {
    **MOE, "hidden_size": 4096, "intermediate_size": 10944, "moe_intermediate_size": 1408, "num_hidden_layers": 6,
    "num_attention_heads": 96, "n_routed_experts": 24, "vocab_size": 151552,
}  # fmt: skip
# Layers of Qwen3.5: three of four with linear attention.
HYBRID = {
    **DENSE, "architectures": ["Qwen3_5ForCausalLM"], "model_type": "qwen3_5_text", "num_hidden_layers": 24,
    "num_key_value_heads": 2, "num_attention_heads": 8, "head_dim": 256, "partial_rotary_factor": 0.25,
    "mtp_num_hidden_layers": 0, "linear_conv_kernel_dim": 4, "linear_key_head_dim": 128, "linear_value_head_dim": 128,
    "linear_num_key_heads": 16, "linear_num_value_heads": 16,
}  # fmt: skip
HYBRID_MOE = {
    **HYBRID, "architectures": ["Qwen3_5MoeForCausalLM"], "model_type": "qwen3_5_moe_text", "num_hidden_layers": 12,
    "num_experts": 64, "num_experts_per_tok": 8, "moe_intermediate_size": 512, "shared_expert_intermediate_size": 512,
    "linear_num_value_heads": 32,
}  # fmt: skip
CONFIGS = {"dense": (DENSE, "qwen3"), "moe": (MOE, "glm4_5"), "air": (AIR, "glm4_5"), "hybrid": (HYBRID, "qwen3_5"),
           "hybrid_moe": (HYBRID_MOE, "qwen3_5_moe")}  # fmt: skip
TINY = {
    "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 512,
    "num_key_value_heads": 2, "head_dim": 32, "torch_dtype": "float32",
}  # fmt: skip
TINY_LINEAR = {
    "num_hidden_layers": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 16, "linear_num_key_heads": 2,
    "linear_num_value_heads": 4, "num_experts": 8,
}  # fmt: skip
TINY_MOE = {"n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 64}

LENGTH, BATCH = 4096, 8  # tokens of a sample, samples of a step


@dataclass(frozen=True)
class Row:
    """side: 'megatron', 'transformers', 'bare' (a loop of megatron-core's own pieces) or 'loop' (transformers alone).
    beside: row that it is compared with. flags: of the command. steps: measured ones, after the warm-up. batch: samples of
    a step.
    """

    name: str
    side: str
    model: str
    flags: Sequence[str] = ()
    gpus: int = 1
    beside: str | None = None
    kind: str = "sft"
    data: str = "fixed"
    steps: int = 5
    warm_up: int = 4
    environment: dict[str, str] = field(default_factory=dict)
    batch: int = BATCH


def micro(size: int) -> list[str]:
    return ["--micro_batch_size", str(size)]


LORA = ["--train_type", "lora", "--lora_rank", "16", "--target_modules", "all-linear", "--lora_dropout", "0"]
QUEUE = {"CUDA_DEVICE_MAX_CONNECTIONS": "1"}  # what megatron-core asks for on older GPUs
TP2 = ["--tensor_model_parallel_size", "2", "--sequence_parallel", "true"]

BLOCKWISE = ["--fp8_format", "e4m3", "--fp8_recipe", "blockwise"]

ROWS = (
    Row("dense mb1", "megatron", "dense", micro(1), beside="dense mb1 hf"),
    Row("dense mb2", "megatron", "dense", micro(2), beside="dense mb1 hf"),
    Row("dense mb1 bare", "bare", "dense", micro(1), beside="dense mb1"),
    Row("dense mb2 bare", "bare", "dense", micro(2), beside="dense mb2"),
    Row("dense mb1 hf", "transformers", "dense", micro(1)),
    Row("moe mb1", "megatron", "moe", micro(1), beside="moe mb1 hf loop"),
    Row("moe mb2", "megatron", "moe", micro(2), beside="moe mb1 hf loop"),
    Row("moe mb1 hf loop", "loop", "moe", micro(1)),
    Row("moe mb1 hf", "transformers", "moe", micro(1), steps=3, warm_up=2),
    Row("lora dense mb1", "megatron", "dense", [*micro(1), *LORA], beside="lora dense mb1 hf"),
    Row("lora dense mb1 hf", "transformers", "dense", [*micro(1), *LORA]),
    Row("lora moe mb1", "megatron", "moe", [*micro(1), *LORA], beside="lora moe mb1 hf"),
    Row("lora moe mb1 hf", "transformers", "moe", [*micro(1), *LORA], steps=2, warm_up=1),
    Row("dpo lora", "megatron", "dense", [*micro(1), *LORA], beside="dpo lora hf", kind="dpo", data="pairs"),
    Row("dpo lora hf", "transformers", "dense", [*micro(1), *LORA], kind="dpo", data="pairs", steps=2, warm_up=1),
    Row("dense mb1 packed", "megatron", "dense", [*micro(1), "--packing", "true"], beside="dense mb1", data="short"),
    # 20 steps on both sides, for their losses too.
    Row("hybrid mb1", "megatron", "hybrid", micro(1), beside="hybrid mb1 hf", steps=16, batch=2),
    Row("hybrid mb1 hf", "transformers", "hybrid", micro(1), steps=16, batch=2),
    Row("hybrid moe mb1", "megatron", "hybrid_moe", micro(1), beside="hybrid moe mb1 hf", steps=16, batch=2),
    Row("hybrid moe mb1 hf", "transformers", "hybrid_moe", micro(1), steps=16, batch=2),
    Row("hybrid mb1 packed", "megatron", "hybrid", [*micro(1), "--packing", "true"], beside="hybrid mb1", data="short"),
    # The same with a switch turned: the losses agree, the time says what it is worth.
    Row("dense mb2 eager", "megatron", "dense", [*micro(2), "--cuda_graph", "false"], beside="dense mb2"),
    Row("dense mb2 plain loss", "megatron", "dense", [*micro(2), "--cross_entropy_loss_fusion", "false"],
        beside="dense mb2"),
    Row("dense mb2 gradients apart", "megatron", "dense", [*micro(2), "--gradient_accumulation_fusion", "false"],
        beside="dense mb2"),
    Row("moe mb1 te experts", "megatron", "moe", [*micro(1), "--moe_grouped_impl", "te"], beside="moe mb1", steps=3),
    Row("moe mb1 eager", "megatron", "moe", [*micro(1), "--cuda_graph", "false"], beside="moe mb1", steps=3),
    # 50 steps each: their last losses are what FP8 is held against.
    Row("dense mb2 long", "megatron", "dense", micro(2), steps=46),
    Row("dense mb2 fp8 blockwise", "megatron", "dense", [*micro(2), *BLOCKWISE], beside="dense mb2 long", steps=46),
    Row("dense mb2 fp8 tensorwise", "megatron", "dense",
        [*micro(2), "--fp8_format", "hybrid", "--fp8_recipe", "tensorwise"], beside="dense mb2 long", steps=46),
    Row("dense mb2 fp8 delayed", "megatron", "dense", [*micro(2), "--fp8_format", "hybrid"], beside="dense mb2 long",
        steps=46),
    Row("moe mb2 long", "megatron", "moe", micro(2), steps=46),
    Row("moe mb2 fp8 blockwise", "megatron", "moe", [*micro(2), *BLOCKWISE], beside="moe mb2 long", steps=46),
    # Two GPUs.
    Row("dense dp2", "megatron", "dense", micro(1), gpus=2, beside="dense mb1"),
    Row("dense tp2", "megatron", "dense", [*micro(1), *TP2], gpus=2, beside="dense mb1"),
    Row("moe ep2", "megatron", "moe", [*micro(1), "--expert_model_parallel_size", "2"], gpus=2, beside="moe mb1"),
    Row("dense pp2", "megatron", "dense", [*micro(1), "--pipeline_model_parallel_size", "2"], gpus=2,
        beside="dense mb1"),
    Row("dense hf dp2", "transformers", "dense", micro(1), gpus=2, beside="dense mb1 hf", steps=3, warm_up=2),
    Row("dense hf shard_grad_op", "transformers", "dense", [*micro(1), "--fsdp", "shard_grad_op"], gpus=2,
        beside="dense hf dp2", steps=3, warm_up=2),
    Row("dense hf full_shard", "transformers", "dense", [*micro(1), "--fsdp", "full_shard"], gpus=2,
        beside="dense hf dp2", steps=3, warm_up=2),
    Row("dense hf offload", "transformers", "dense", [*micro(1), "--fsdp", "full_shard", "offload"], gpus=2,
        beside="dense hf dp2", steps=2, warm_up=1),
    Row("dense hf sp2", "transformers", "dense",
        [*micro(1), "--fsdp", "full_shard", "--sequence_parallel_size", "2"], gpus=2, beside="dense hf dp2", steps=3,
        warm_up=2),
    Row("dense dp2 one queue", "megatron", "dense", micro(1), gpus=2, beside="dense dp2", environment=QUEUE),
    Row("dense tp2 one queue", "megatron", "dense", [*micro(1), *TP2], gpus=2, beside="dense tp2", environment=QUEUE),
)  # fmt: skip


def layouts(gpus: int) -> list[Row]:
    """Rows of the same 16 samples a step on 1, 2, 4, ... `gpus` GPUs."""
    rows = [_layout("air dp1", 1)]
    for count in (2**power for power in range(1, gpus.bit_length())):
        rows += [_layout(f"air dp{count}", count), _layout(f"air ep{count}", count, ep=count)]
        rows.append(_layout(f"air cp2 ep{count}", count, ep=count, cp=2))
        if count >= 4:
            rows.append(_layout(f"air tp2 pp2 ep{count // 2}", count, ep=count // 2, tp=2, pp=2))
    return rows


def _layout(name: str, gpus: int, **sizes: int) -> Row:
    words = {"tp": "tensor_model", "pp": "pipeline_model", "ep": "expert_model", "cp": "context"}
    flags = [word for kind, size in sizes.items() for word in (f"--{words[kind]}_parallel_size", str(size))]
    if "tp" in sizes:
        flags += ["--sequence_parallel", "true", "--expert_tensor_parallel_size", "1"]
    return Row(name, "megatron", "air", [*micro(1), *flags], gpus, "air dp1" if gpus > 1 else None, batch=16)


def make_model(name: str, directory: Path, tiny: bool) -> int:
    """Random weights and a tokenizer of single bytes. Returns: parameters."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    config: dict[str, Any] = CONFIGS[name][0]
    if tiny:
        more = TINY_LINEAR if name.startswith("hybrid") else {} if name == "dense" else TINY_MOE
        config = {**config, **TINY, **more}
    directory.mkdir(parents=True)
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<|im_end|>", *pre_tokenizers.ByteLevel.alphabet()])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<pad>")
    fast.save_pretrained(directory)
    (directory / "config.json").write_text(json.dumps(config))
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = AutoModelForCausalLM.from_config(
            AutoConfig.from_pretrained(directory), dtype=getattr(torch, config["torch_dtype"])
        )
    count = sum(p.numel() for p in model.parameters())
    model.save_pretrained(directory)
    (directory / "config.json").write_text(json.dumps(config))
    return count


def make_data(kind: str, file: Path, length: int, steps: int) -> None:
    """fixed: longer than `length`, so that each sample is cut to exactly that. short: of many lengths, to be packed.
    pairs: an answer and a rejected one, together `length` tokens after cutting.
    """
    words = random.Random(0)

    def text(tokens: float) -> str:
        return " ".join(str(words.randrange(10**6)) for _ in range(int(tokens / 6) + 2))

    lines = []
    for _ in range(steps * BATCH * (8 if kind == "short" else 1)):
        size = words.uniform(0.05, 0.45) * length if kind == "short" else 1.5 * length
        messages = [{"role": "user", "content": "Count."}, {"role": "assistant", "content": text(size)}]
        lines.append({"messages": messages, **({"rejected_response": text(size)} if kind == "pairs" else {})})
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
