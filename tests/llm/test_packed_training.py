"""Joined samples train as separate ones do: the same loss, the same gradients, and none of them sees another."""

from __future__ import annotations

import json
import shutil
from typing import Any

import pytest
import torch

from swiftlite.llm.dataset import EncodedDataset, PackedDataset
from swiftlite.llm.dataset.packing import pack_windows
from swiftlite.llm.template import get_template
from swiftlite.llm.train.packed import block_diagonal_mask, needs_mask
from tests.families.cases import build_hf, config_of

ROWS = [
    {"messages": [{"role": "user", "content": f"What is {i} plus {i}?"},
                  {"role": "assistant", "content": f"It is {2 * i}. " + "Paris is nice. " * (i % 4)}]}
    for i in range(12)
]  # fmt: skip
FAMILIES = ["llama", "qwen2", "qwen3", "qwen3_moe", "glm4_moe"]
TYPES = {"llama": "llama3_1", "qwen2": "qwen2_5", "qwen3": "qwen3", "qwen3_moe": "qwen3_moe", "glm4_moe": "glm4_5",
         "mla": "moonlight"}  # fmt: skip


@pytest.fixture
def hf(tiny_model):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    def make(family: str, attention: str = "sdpa") -> tuple[Any, Any]:
        directory = tiny_model(family)
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation=attention)
        return model.eval(), get_template("qwen3", AutoTokenizer.from_pretrained(directory))

    return make


def loss_and_gradients(model, batch):
    model.zero_grad()
    tokens = (batch["labels"] != -100).sum()
    logits = model(**{k: v for k, v in batch.items() if k != "labels"}, use_cache=False).logits[:, :-1]
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten(), reduction="sum")
    (loss / tokens).backward()
    return loss.item() / int(tokens), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def compare(first, second, tolerance):
    (loss, gradients), (other_loss, others) = first, second
    assert loss == pytest.approx(other_loss, rel=1e-5)
    assert gradients.keys() == others.keys()
    whole = torch.stack([g.norm() for g in gradients.values()]).norm()
    for name, gradient in gradients.items():
        difference = (gradient - others[name]).norm() / max(gradient.norm(), 1e-6 * whole)
        assert difference < tolerance, (name, difference)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_hugging_face_packed_equals_padded(hf, family, attention):
    model, template = hf(family, attention)
    dataset = EncodedDataset(ROWS, template)
    packed = PackedDataset(dataset, 200, seed=1)
    assert 1 < len(packed) < len(dataset)
    assert not needs_mask(model, torch.device("cpu"))
    padded = loss_and_gradients(model, template.data_collator([dataset[i] for i in range(len(dataset))]))
    template.padding_free = True
    joined = template.data_collator([packed[i] for i in range(len(packed))])
    assert joined["input_ids"].shape == (1, sum(dataset.lengths))
    compare(padded, loss_and_gradients(model, joined), 1e-4)
    # The explicit mask, for models that do not read positions.
    joined["attention_mask"] = block_diagonal_mask(joined["position_ids"], torch.float32)
    compare(padded, loss_and_gradients(model, joined), 1e-4)
    # Control: without borders the loss is another.
    joined["position_ids"] = torch.arange(joined["input_ids"].shape[1]).unsqueeze(0)
    del joined["attention_mask"]
    assert abs(loss_and_gradients(model, joined)[0] - padded[0]) > 1e-3


@pytest.mark.parametrize("family", FAMILIES)
def test_hugging_face_samples_do_not_see_each_other(hf, family):
    model, template = hf(family)
    dataset = EncodedDataset(ROWS, template)
    template.padding_free = True
    batch = template.data_collator([dataset[0], dataset[1]])
    border = dataset.lengths[0]
    changed = {k: v.clone() for k, v in batch.items()}
    changed["input_ids"][0, border // 2] += 1
    with torch.no_grad():
        first, second = (
            model(b["input_ids"], position_ids=b["position_ids"], use_cache=False).logits[0] for b in (batch, changed)
        )
    assert not torch.equal(first[border // 2 : border], second[border // 2 : border])
    if "moe" in family:
        # Tokens of both samples share an expert's matrix product, whose rounding depends on how many they are.
        assert (first[border:] - second[border:]).abs().max() < 1e-6 * first.abs().max()
    else:
        assert torch.equal(first[border:], second[border:])


def test_a_model_that_ignores_positions_gets_the_mask(hf):
    model, _ = hf("llama")
    forward = model.forward

    def deaf(input_ids, position_ids=None, attention_mask=None, **kwargs):
        if attention_mask is None:  # as older code does: one causal sequence, rotated by the given positions
            attention_mask = block_diagonal_mask(torch.arange(input_ids.shape[1]).unsqueeze(0), torch.float32)
        return forward(input_ids=input_ids, position_ids=position_ids, attention_mask=attention_mask, **kwargs)

    model.forward = deaf
    assert needs_mask(model, torch.device("cpu"))


# ---- Megatron ----


@pytest.fixture
def first_step(tiny_model, tiny_tokenizer_dir, tmp_path, monkeypatch):
    """Loss and gradients of one step over all rows, as `megatron sft` makes them."""
    pytest.importorskip("megatron.core")
    from swiftlite.megatron.trainers.base import Trainer
    from swiftlite.megatron.trainers.sft import megatron_sft_main

    def model_of(family):
        if family != "mla":
            return tiny_model(family)
        directory = tmp_path / "mla"
        if not directory.exists():
            config = {**config_of("moonlight:default"), "max_position_embeddings": 256}
            build_hf({**config, "vocab_size": max(320, config["vocab_size"])}, directory)
            for file in tiny_tokenizer_dir.iterdir():
                shutil.copy(file, directory)
        return directory

    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    original, seen = Trainer.run_batches, {}

    def spy(self, batches, forward_only):
        result = original(self, batches, forward_only)
        seen["batches"] = batches
        seen["gradients"] = {n: p.main_grad.clone() for n, p in self.models[0].named_parameters()}
        return result

    monkeypatch.setattr(Trainer, "run_batches", spy)

    def run(family, output, **flags):
        settings = {
            "model": model_of(family), "model_type": TYPES[family], "template": "qwen3", "dataset": data,
            "output_dir": tmp_path / output, "torch_dtype": "float32", "train_iters": 1, "max_length": 200,
            "no_save_optim": "true", **flags,
        }  # fmt: skip
        result = megatron_sft_main([word for name, value in settings.items() for word in (f"--{name}", str(value))])
        return (result["loss"], seen["gradients"]), seen["batches"]

    return run


@pytest.mark.parametrize("family", ["qwen3", "glm4_moe", "mla"])
def test_megatron_packed_equals_padded(first_step, family):
    padded, batches = first_step(family, "padded", micro_batch_size=12, global_batch_size=12)
    assert len(batches) == 1 and batches[0].tokens.shape[0] == 12
    free, batches = first_step(family, "free", micro_batch_size=6, global_batch_size=12, padding_free="true")
    assert [b.tokens.shape[0] for b in batches] == [1, 1]
    assert sum(b.cu_seqlens.numel() - 1 for b in batches) == 12
    compare(padded, free, 1e-4)
    lengths = [int(n) for b in batches for n in b.cu_seqlens.diff()]
    sequences = len(pack_windows(lengths, 200, seed=42))
    assert sequences < 8
    packed, batches = first_step(family, "packed", micro_batch_size=1, global_batch_size=sequences, packing="true")
    assert sum(b.cu_seqlens.numel() - 1 for b in batches) == 12, "all rows in the step"
    compare(padded, packed, 1e-4)


def test_megatron_samples_do_not_see_each_other(first_step, monkeypatch):
    """Token losses of the second sample stay bit-equal when a token of the first changes."""
    from swiftlite.megatron.trainers import sft
    from swiftlite.megatron.trainers.batch import BatchLoader

    seen, load = [], BatchLoader.load
    original = sft.language_model_loss

    def loss(mask, token_losses, **kwargs):
        seen.append(token_losses.detach().clone())
        return original(mask, token_losses, **kwargs)

    def changed(self, micro_batches):
        batches = load(self, micro_batches)
        batches[0].tokens[0, 4] += 1
        return batches

    monkeypatch.setattr(sft, "language_model_loss", loss)
    flags = {"micro_batch_size": 4, "global_batch_size": 4, "padding_free": "true", "dataset_shuffle": "false"}
    _, (batch,) = first_step("qwen3", "first", **flags)
    monkeypatch.setattr(BatchLoader, "load", changed)
    first_step("qwen3", "second", **flags)
    border = int(batch.cu_seqlens[1])
    before, after = (losses.flatten() for losses in seen)
    assert not torch.equal(before[4:border], after[4:border])
    assert torch.equal(before[border:], after[border:])
