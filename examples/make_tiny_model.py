"""Make a tiny GLM-4.5-style mixture of experts with random weights and its own tokenizer: nothing is downloaded.

    python examples/make_tiny_model.py OUTPUT_DIR --corpus FILE.jsonl

Same architecture as GLM-4.5-Air (grouped-query attention with bias, half rotary, a dense first layer, sigmoid routing
with an expert bias, a shared expert), about half a million parameters. The tokenizer is trained on the corpus.
"""

import argparse
import json
from pathlib import Path

CONFIG = {
    "architectures": ["Glm4MoeForCausalLM"],
    "model_type": "glm4_moe",
    "hidden_size": 96,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "attention_bias": True,
    "attention_dropout": 0.0,
    "partial_rotary_factor": 0.5,
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "use_qk_norm": False,
    "max_position_embeddings": 512,
    "hidden_act": "silu",
    "initializer_range": 0.05,
    "rms_norm_eps": 1e-5,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.0,
    "tie_word_embeddings": False,
    "use_cache": True,
    "torch_dtype": "float32",
}
SPECIAL = ["<|endoftext|>", "[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"]


def make_tokenizer(corpus: list[str], output: Path) -> int:
    """Train a byte-level BPE tokenizer with GLM's special tokens. Returns: its number of tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(corpus, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=SPECIAL[0], pad_token=SPECIAL[0])
    fast.save_pretrained(output)
    stated = json.loads((output / "tokenizer_config.json").read_text())
    stated["tokenizer_class"] = "PreTrainedTokenizerFast"
    (output / "tokenizer_config.json").write_text(json.dumps(stated, indent=2) + "\n")
    return len(fast)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--corpus", type=Path, required=True, help="JSONL file with `messages`")
    args = parser.parse_args()

    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    rows = [json.loads(line) for line in args.corpus.read_text(encoding="utf-8").splitlines() if line.strip()]
    args.output.mkdir(parents=True)
    tokens = make_tokenizer([m["content"] for row in rows for m in row["messages"]], args.output)
    ids = {name: SPECIAL.index(name) for name in ("<|endoftext|>", "<|user|>", "<|observation|>")}
    config = {**CONFIG, "vocab_size": tokens, "eos_token_id": list(ids.values()), "pad_token_id": 0}
    text = json.dumps(config, indent=2) + "\n"
    (args.output / "config.json").write_text(text)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(args.output), dtype=torch.float32)
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer += 0.05 * torch.randn_like(buffer)
    model.save_pretrained(args.output)
    (args.output / "config.json").write_text(text)  # as hubs write it, whatever this transformers release prefers


if __name__ == "__main__":
    main()
