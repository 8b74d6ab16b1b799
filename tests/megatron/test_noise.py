"""NEFTune on Megatron: noise of transformers' size on the embeddings, in training only."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from swiftlite.megatron.trainers.wrapping import add_noise
from tests.families.cases import build_hf, config_of
from tests.megatron.test_hf_io import IDS, live


def test_noise_is_that_of_transformers(tmp_path: Path) -> None:
    build_hf(config_of("qwen3:default"), tmp_path / "hf")
    with live(tmp_path / "hf") as (models, _), torch.no_grad():
        embedding, positions = models[0].embedding, torch.arange(IDS.shape[1])[None]
        embedding.word_embeddings.weight.normal_()
        plain = embedding(IDS, positions)
        add_noise(models, 5.0)
        noise = embedding.train()(IDS, positions) - plain
        limit = 5.0 / math.sqrt(plain.shape[0] * plain.shape[2])
        assert 0.9 * limit < noise.abs().max() <= limit * (1 + 1e-4)
        assert noise.std().item() == pytest.approx(limit / math.sqrt(3), rel=0.05)
        assert abs(noise.mean()) < 0.1 * limit
        assert torch.equal(embedding.eval()(IDS, positions), plain)
