"""A tiny model that chats, and an adapter of it, for tests of serving and evaluation."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.serving import teach


@pytest.fixture(scope="session")
def chat_model(tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("models") / "tiny"
    shutil.copytree(tiny_model("qwen3", max_position_embeddings=512), directory)
    teach(directory)
    return directory


@pytest.fixture(scope="session")
def adapter(chat_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    directory = tmp_path_factory.mktemp("run") / "checkpoint-4"
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(chat_model), LoraConfig(r=6, target_modules=["q_proj", "v_proj"])
    )
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.1)
    model.save_pretrained(directory)
    return directory
