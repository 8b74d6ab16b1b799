"""Shared fixtures: tiny Hugging Face model directories and a tiny tokenizer, made on the spot without network."""

from __future__ import annotations

import gc
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from swiftlite.families import tiny_configs
from swiftlite.train.metrics import Metrics
from tests.browser import CHROMIUM, Page

os.environ["SWIFTLITE_CACHE"] = os.devnull  # nothing is kept between runs, but where a test says so

GOLDEN = Path(__file__).parent / "golden"

CORPUS = [
    "The quick brown fox jumps over the lazy dog.",
    "What is the capital of France? The capital of France is Paris.",
    "You are a helpful assistant. Hello! How can I help you today?",
    "Weights are read from the file, one tensor at a time.",
]

# Of the self-tests' small configs, what tests of commands change to be faster. Tests of one setting say it themselves.
_CHANGES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"num_hidden_layers": 2, "rms_norm_eps": 1e-6}),
    "qwen2": ("qwen2", {"num_hidden_layers": 2, "rope_theta": 10000.0}),
    "qwen3": ("qwen3", {"num_hidden_layers": 2, "rope_theta": 10000.0}),
    "qwen3_moe": (
        "qwen3_moe",
        {"num_hidden_layers": 2, "rope_theta": 10000.0, "num_experts": 4, "router_aux_loss_coef": 0.0},
    ),
    "glm4_moe": (
        "glm4_5",
        {"num_hidden_layers": 3, "rope_theta": 10000.0, "n_routed_experts": 4, "head_dim": 16, "rms_norm_eps": 1e-6,
         "routed_scaling_factor": 1.5, "num_nextn_predict_layers": 0},
    ),
}  # fmt: skip
TINY_CONFIGS: dict[str, dict[str, Any]] = {
    family: {**tiny_configs()[model_type]["default"], **changes} for family, (model_type, changes) in _CHANGES.items()
}


_PLOT = Metrics.plot


@pytest.fixture(scope="session", autouse=True)
def no_plots() -> Iterator[None]:
    """Drawing a run's plot takes as long as its steps: only tests with `plots` draw one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Metrics, "plot", lambda self: None)
        yield


@pytest.fixture
def plots(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Metrics, "plot", _PLOT)


@pytest.fixture(scope="module", autouse=True)
def imports_are_no_garbage() -> None:
    """Trainers call gc.collect(), which looks through all that torch and others imported: more than half of a tiny run."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def page(tmp_path: Path) -> Iterator[Page]:
    """An empty page in a browser."""
    if CHROMIUM is None:
        pytest.skip("no browser on this machine: apt install chromium")
    page = Page(tmp_path / "profile")
    yield page
    page.close()


@pytest.fixture(scope="session")
def tiny_tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level BPE tokenizer of about 300 tokens with bos <s> (1), eos </s> (2), pad <pad> (0)."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=310,
        special_tokens=["<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    directory = tmp_path_factory.mktemp("tokenizer")
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", model_max_length=256
    )
    fast.save_pretrained(directory)
    stated = json.loads((directory / "tokenizer_config.json").read_text())
    stated["tokenizer_class"] = "PreTrainedTokenizerFast"  # a name that every transformers release knows
    (directory / "tokenizer_config.json").write_text(json.dumps(stated, indent=1))
    return directory


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer_dir: Path) -> Callable[..., Path]:
    """`tiny_model("qwen3", vocab_size=333)` -> directory with random fp32 weights, config and tokenizer; the name is one of
    TINY_CONFIGS or a model type.

    1-D parameters and expert biases are randomised too: they start at 1 or 0, where mistakes in their mapping hide.
    The same arguments give the same directory, so tests must not write into it.
    """
    made: dict[str, Path] = {}

    def make(family: str, seed: int = 0, tokenizer: bool = True, **overrides: Any) -> Path:
        key = json.dumps([family, seed, tokenizer, overrides], sort_keys=True)
        if key in made:
            return made[key]
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM

        config = {**(TINY_CONFIGS.get(family) or tiny_configs()[family]["default"]), **overrides}
        directory = tmp_path_factory.mktemp(f"{family}-model")
        (directory / "config.json").write_text(json.dumps(config, indent=2))
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(directory), dtype=torch.float32)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.dim() == 1 or name.endswith("_bias"):
                    parameter += 0.1 * torch.randn_like(parameter)
            for name, buffer in model.named_buffers():
                if name.endswith("e_score_correction_bias"):
                    buffer += 0.05 * torch.randn_like(buffer)
        model.save_pretrained(directory)
        (directory / "config.json").write_text(json.dumps(config, indent=2))  # hub style, not this transformers' style
        if tokenizer:
            for file in tiny_tokenizer_dir.iterdir():
                shutil.copy(file, directory)
        made[key] = directory
        return directory

    return make


@pytest.fixture(scope="session")
def tiny_mla(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer_dir: Path) -> Callable[[int], Path]:
    """`tiny_mla(seed)` -> as tiny_model, of Moonlight's kind: latent attention and experts, an odd vocabulary."""
    made: dict[int, Path] = {}

    def make(seed: int = 0) -> Path:
        from tests.families.cases import build_hf, config_of

        if seed not in made:
            made[seed] = tmp_path_factory.mktemp("moonlight-model")
            config = {**config_of("moonlight:default"), "max_position_embeddings": 256, "vocab_size": 333}
            build_hf(config, made[seed], seed)
            for file in tiny_tokenizer_dir.iterdir():
                shutil.copy(file, made[seed])
        return made[seed]

    return make


class Syncs:
    """What had not been forced to the disk when a file or directory took the name by which readers find it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        synced: dict[int, float] = {}  # inode -> when
        self._renamed: dict[str, list[str]] = {}
        fsync = os.fsync

        def record_sync(fd: int) -> None:
            fsync(fd)
            synced[os.fstat(fd).st_ino] = os.fstat(fd).st_mtime

        def recording(rename: Callable[..., None]) -> Callable[..., None]:
            def record_rename(source: Any, target: Any, **options: Any) -> None:
                paths = [Path(source), *Path(source).rglob("*")]
                self._renamed[str(target)] = [str(p) for p in paths if synced.get(p.stat().st_ino) != p.stat().st_mtime]
                rename(source, target, **options)

            return record_rename

        monkeypatch.setattr(os, "fsync", record_sync)
        for name in ("rename", "replace"):
            monkeypatch.setattr(os, name, recording(getattr(os, name)))

    def unsynced(self, target: Path) -> list[str]:
        """Raises: KeyError if nothing was renamed to `target`."""
        return self._renamed[str(target)]


@pytest.fixture
def syncs(monkeypatch: pytest.MonkeyPatch) -> Syncs:
    return Syncs(monkeypatch)
