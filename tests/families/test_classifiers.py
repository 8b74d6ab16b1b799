"""Classifiers of every family that transformers has one of: converted both ways, computed, and made of a language model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForSequenceClassification
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES as CLASSES

from swiftlite.checkpoint.bind import convert_hf_config
from swiftlite.checkpoint.checkpoint import Checkpoint
from swiftlite.checkpoint.head import plan_head, with_head
from swiftlite.checkpoint.registry import get_model_info_meta
from swiftlite.convert.conversion import Options, convert
from swiftlite.convert.hf import HfTarget
from swiftlite.convert.mcore import McoreTarget
from swiftlite.families.hf_config import classes_of
from swiftlite.selftest.check import check_config
from swiftlite.utils.errors import ConfigError, UsageError
from swiftlite.weights.head import initial_head
from tests.families.cases import build_hf, config_of, distinct_cases


def classifier(case: str, num_labels: int = 3, **others: Any) -> dict[str, Any]:
    """config.json of one."""
    config = config_of(case)
    names = {str(i): f"kind {i}" for i in range(num_labels)}
    return {**config, "architectures": [CLASSES[config["model_type"]]], "id2label": names, "pad_token_id": 0, **others}


def cases() -> list[str]:
    """One for each class: those that are tied first, whose heads are not."""
    found: dict[str, str] = {}
    for case in sorted(distinct_cases(), key=lambda case: not config_of(case).get("tie_word_embeddings")):
        config = config_of(case)
        if config["model_type"] in CLASSES and "text_config" not in config:
            found.setdefault(CLASSES[config["model_type"]], case)
    return list(found.values())


def build(config: dict[str, Any], directory: Path, dtype: torch.dtype = torch.float32) -> Any:
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config))
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(AutoConfig.from_pretrained(directory), dtype=dtype)
    model.save_pretrained(directory)
    (directory / "config.json").write_text(json.dumps(config))
    return model.eval()


def there_and_back(source: Checkpoint, root: Path) -> Path:
    convert(source, McoreTarget(), root / "mcore", Options(quiet=True))
    convert(Checkpoint.open(root / "mcore"), HfTarget(), root / "back", Options(quiet=True))
    return root / "back"


@pytest.mark.parametrize("case", cases())
def test_there_and_back_is_bit_exact(case: str, tmp_path: Path) -> None:
    model = build(classifier(case), tmp_path / "hf", torch.bfloat16)
    assert model.score.weight.dtype == torch.bfloat16
    back = there_and_back(Checkpoint.open(tmp_path / "hf"), tmp_path)
    assert (back / "model.safetensors").read_bytes() == (tmp_path / "hf/model.safetensors").read_bytes()
    assert json.loads((back / "config.json").read_text())["architectures"] == [type(model).__name__]


@pytest.mark.parametrize("case, num_labels", [("qwen3:tied", 1), ("deepseek_r1:grouped_ratio1", 3)])
def test_numbers_and_gradients_are_those_of_transformers(case: str, num_labels: int) -> None:
    assert check_config(case, classifier(case, num_labels)).logits_error < 1e-5


def test_labels_are_counted_as_transformers_does(tmp_path: Path) -> None:
    config = {**classifier("llama:default"), "id2label": None}
    for stated in (
        {},
        {"num_labels": 5},
        {"id2label": {"0": "a"}},
        {"id2label": {"0": "a", "1": "b"}, "num_labels": 2},
    ):
        (tmp_path / "config.json").write_text(json.dumps({**config, **stated}))
        assert classes_of({**config, **stated}) == AutoConfig.from_pretrained(tmp_path).num_labels
    assert classes_of(config_of("llama:default")) is None
    with pytest.raises(ConfigError, match="num_labels 0"):
        classes_of({**config, "num_labels": 0})


def test_model_types_stay_the_same(tmp_path: Path) -> None:
    config = classifier("qwen3_moe:default")
    (tmp_path / "config.json").write_text(json.dumps(config))
    info, meta = get_model_info_meta(str(tmp_path), need_template=False)
    assert meta.model_type == "qwen3_moe" and info.config == config
    converted = convert_hf_config(config)
    assert converted["architectures"] == "Qwen3MoeForCausalLM" and converted["num_labels"] == 3


@pytest.mark.parametrize("case", ["qwen3:tied", "qwen3_moe:default", "deepseek_r1:grouped_ratio1"])
@pytest.mark.parametrize("side", ["hf", "mcore"])
def test_a_language_model_becomes_a_classifier(case: str, side: str, tmp_path: Path) -> None:
    """Neither its output layer nor its MTP blocks are used; the head is the same whatever it is made on."""
    config = config_of(case)
    build_hf(config, tmp_path / "hf")
    head = plan_head(config, 3, seed=1, problem_type="multi_label_classification")
    if side == "mcore":
        convert(Checkpoint.open(tmp_path / "hf"), McoreTarget(), tmp_path / "base", Options(quiet=True))
    source = with_head(Checkpoint.open(tmp_path / ("base" if side == "mcore" else "hf")), head)
    back = there_and_back(source, tmp_path)
    model, loading = AutoModelForSequenceClassification.from_pretrained(back, output_loading_info=True)
    assert not any(loading.values()), loading
    assert model.config.num_labels == 3 and model.config.problem_type == "multi_label_classification"
    weight, std = model.score.weight.detach(), config.get("initializer_range", 0.02)
    assert torch.equal(weight, initial_head(3, config["hidden_size"], std, seed=1))
    assert float(weight.std()) == pytest.approx(std, rel=0.2)


def test_seeds_give_other_heads() -> None:
    assert not torch.equal(initial_head(2, 64, 0.02, 1), initial_head(2, 64, 0.02, 2))


def test_what_has_no_classifier() -> None:
    for case in ("glm4_5:default", "granite:default"):
        with pytest.raises(ConfigError, match="transformers has no ForSequenceClassification class"):
            plan_head(config_of(case), 2, 0)
    with pytest.raises(UsageError, match="the model's head has 3"):
        plan_head(classifier("qwen3:default"), 2, 0)
    own = plan_head(classifier("qwen3:default"), 3, 0, pad_token_id=5)
    assert own.seed is None and own.changes == {"pad_token_id": 5}
