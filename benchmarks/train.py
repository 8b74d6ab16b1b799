"""Training speed of `swiftlite megatron sft` beside `swiftlite sft` (transformers): same model, samples, batch.

    python benchmarks/train.py --model tiny                        two cores, fp32
    python benchmarks/train.py --model dense --train_type lora     one GPU, bf16, about 1.5 billion parameters
    python benchmarks/train.py --model moe --profile               about 2.6 billion, GLM-4.5's kind

Both run in this process in turn, `--rounds` times. Columns are medians over the steps after the first `--warmup` ones:
seconds of a step, tokens/s, TFLOP/s and MFU (operations that the model needs), the time beside transformers, and
the most memory of the device.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import shutil
import statistics
from pathlib import Path
from typing import Any

import torch

TINY = {
    "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_size": 256, "intermediate_size": 768,
    "num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 32, "hidden_act": "silu",
    "vocab_size": 4096, "max_position_embeddings": 8192, "rms_norm_eps": 1e-6, "rope_theta": 1000000,
    "tie_word_embeddings": False, "torch_dtype": "float32",
}  # fmt: skip
DENSE = {
    **TINY, "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 28, "num_attention_heads": 16,
    "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 32000, "torch_dtype": "bfloat16",
}  # fmt: skip
MOE = {
    **DENSE, "architectures": ["Glm4MoeForCausalLM"], "model_type": "glm4_moe", "num_hidden_layers": 12,
    "attention_bias": True, "partial_rotary_factor": 0.5, "first_k_dense_replace": 1, "n_routed_experts": 32,
    "n_shared_experts": 1, "num_experts_per_tok": 4, "moe_intermediate_size": 1024, "n_group": 1, "topk_group": 1,
    "norm_topk_prob": True, "routed_scaling_factor": 1.0, "use_qk_norm": False,
}  # fmt: skip
# config, model type, tokens of a sample, micro batch, global batch
PRESETS: dict[str, tuple[dict[str, Any], str, int, int, int]] = {
    "tiny": (TINY, "qwen3", 256, 4, 8),
    "dense": (DENSE, "qwen3", 4096, 1, 4),
    "moe": (MOE, "glm4_5", 4096, 1, 4),
}


def make_model(config: dict[str, Any], directory: Path) -> int:
    """Random weights and a tokenizer of single bytes. Returns: parameters."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    directory.mkdir(parents=True)
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<|im_end|>", *pre_tokenizers.ByteLevel.alphabet()])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<pad>")
    fast.save_pretrained(directory)
    (directory / "config.json").write_text(json.dumps(config))
    torch.manual_seed(0)
    dtype = getattr(torch, config["torch_dtype"])
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(directory), dtype=dtype)
    count = sum(p.numel() for p in model.parameters())
    model.save_pretrained(directory)
    (directory / "config.json").write_text(json.dumps(config))
    return count


def make_rows(file: Path, count: int, length: int) -> None:
    """Conversations that are longer than `length` tokens, so that each sample is cut to exactly that."""
    words = random.Random(0)
    lines = []
    for _ in range(count):
        text = " ".join(str(words.randrange(10**6)) for _ in range(length // 4))
        messages = [{"role": "user", "content": "Count."}, {"role": "assistant", "content": text}]
        lines.append(json.dumps({"messages": messages}))
    file.write_text("\n".join(lines) + "\n")


def train(side: str, words: list[str], output: Path) -> list[dict[str, float]]:
    """One run. Returns: its log lines, one a step."""
    from swiftlite import megatron_sft_main, sft_main
    from swiftlite.train.plot import read_run

    shutil.rmtree(output, ignore_errors=True)
    {"megatron": megatron_sft_main, "transformers": sft_main}[side]([*words, "--output_dir", str(output)])
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    lines = read_run(output)
    shutil.rmtree(output)
    return [line for line in lines if "step_s" in line]


def profile(words: list[str], output: Path) -> None:
    """Print what the Megatron side's time goes to, by kernels (GPU) or operators (CPU)."""
    from torch.profiler import ProfilerActivity

    cuda = torch.cuda.is_available()
    with torch.profiler.profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as record:
        lines = train("megatron", words, output)
    costs = record.key_averages()
    order = "self_cuda_time_total" if cuda else "self_cpu_time_total"
    print(costs.table(sort_by=order, row_limit=16, max_name_column_width=70))
    busy = sum(getattr(cost, "self_device_time_total" if cuda else order) for cost in costs) / 1e6
    print(f"{busy:.2f} s of this in {sum(line['step_s'] for line in lines):.2f} s of {len(lines)} steps")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=PRESETS, default="tiny")
    parser.add_argument("--train_type", choices=("full", "lora"), nargs="+", default=["full"])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--warmup", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--directory", type=Path, default=Path("/tmp/swiftlite-bench-train"))
    args = parser.parse_args()
    config, model_type, length, micro, batch = PRESETS[args.model]
    model, data = args.directory / args.model, args.directory / f"{args.model}.jsonl"
    if not model.exists():
        make_model(config, model)
    make_rows(data, args.steps * batch, length)
    words = ["--model", str(model), "--model_type", model_type, "--template", "chatml", "--dataset", str(data)]
    words += ["--train_iters", str(args.steps), "--micro_batch_size", str(micro), "--global_batch_size", str(batch)]
    words += ["--max_length", str(length), "--truncation_strategy", "right", "--logging_steps", "1"]
    words += ["--save_weights_only", "true", "--report_to", "none"]
    for train_type in args.train_type:
        both = [*words, "--train_type", train_type]
        if train_type == "lora":
            both += ["--lora_rank", "16", "--target_modules", "all-linear"]
        compare(f"{args.model}, {train_type}, {batch} x {length} tokens a step, {config['torch_dtype']}", both, args)
        if args.profile:
            profile(both, args.directory / "profiled")


def compare(title: str, words: list[str], args: argparse.Namespace) -> None:
    """Train on both sides in turn and print a table."""
    runs: dict[str, list[dict[str, float]]] = {"transformers": [], "megatron": []}
    for _ in range(args.rounds):
        for side, lines in runs.items():
            lines += train(side, words, args.directory / side)[args.warmup :]
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    print(f"{title}; {device}")
    print(f"{'':<14}{'step s':>8}{'tokens/s':>10}{'TFLOP/s':>9}{'MFU %':>7}{'beside':>8}{'GiB':>7}")
    base = statistics.median(line["step_s"] for line in runs["transformers"])
    for side, lines in runs.items():
        seconds, tokens, tflops, mfu, memory = (
            statistics.median(line.get(name, 0.0) for line in lines)
            for name in ("step_s", "tokens_per_second", "tflops", "mfu", "memory_gib")
        )
        rates = f"{seconds:>8.3f}{tokens:>10.0f}{tflops:>9.2f}{100 * mfu:>7.1f}"
        print(f"{side:<14}{rates}{seconds / base:>8.2f}{memory:>7.1f}", flush=True)


if __name__ == "__main__":
    main()
