"""A byte-level BPE tokenizer that knows the special tokens of every template."""

from __future__ import annotations

import pytest

SPECIAL_TOKENS = [
    *("<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|startoftext|>"),
    *("[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>", "<think>", "</think>"),
    *("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|eom_id|>", "<|python_tag|>"),
    *("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>"),
    *("<|begin_of_sentence|>", "<|end_of_sentence|>", "<tool_call>", "</tool_call>"),
]
CORPUS = [
    "What is the capital of France? The capital of France is Paris. About two million people live in the city itself.",
    "You are a terse assistant. Answer in one sentence. User: Assistant: ### Problem: ### Solution:",
    "system user assistant",
    '{"name": "get_weather", "arguments": {"city": "Paris"}} def f(x):\n    return x\n\n',
]


@pytest.fixture(scope="session")
def make_tokenizer():
    """`make_tokenizer(eos_token="</s>", ...)` -> a fast tokenizer of about 400 tokens; adds nothing by itself."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(CORPUS, trainer)
    text = bpe.to_str()

    def make(**special_tokens):
        return PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer.from_str(text), **{"pad_token": "<pad>", **special_tokens}
        )

    return make
