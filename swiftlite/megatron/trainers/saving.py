"""The files of a run on megatron-core: next to its checkpoints, adapters and Hugging Face directories beside them."""

from __future__ import annotations

import shlex
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from swiftlite.checkpoint.chat import Chat
from swiftlite.checkpoint.side_files import MANIFEST, MEGATRON_LM_ARGS, read_manifest, write_manifest
from swiftlite.convert.adapters import CONFIG as ADAPTER_CONFIG
from swiftlite.convert.adapters import merge_to_hf, open_adapter, write_peft
from swiftlite.convert.origin import Origin
from swiftlite.megatron import state as checkpoint
from swiftlite.megatron.background import Write
from swiftlite.megatron.hf_io import prepare_hf_weights
from swiftlite.megatron.model.config import torch_dtype
from swiftlite.megatron.tuners.lora_plan import LoraPlan
from swiftlite.utils.io import move_files, write_json, write_text_atomic

HF_SUFFIX = "-hf"
_RUN_FILES = ".run-files.saving"  # of a run's own directory, while they are made


class RunFiles:
    """Args: origin_dir: of the weights that the run starts from. chat: what directories tell of it, on rank 0."""

    def __init__(self, args: Any, origin: Origin, origin_dir: Path, lora: LoraPlan | None, chat: Chat | None) -> None:
        self.args, self.origin, self.origin_dir, self.lora, self.chat = args, origin, origin_dir, lora, chat
        self.root = Path(args.output_dir)

    def write(self) -> None:
        """Config, tokenizer, manifest and arguments next to the checkpoints, before the first one. Rank 0 only."""
        beside = self.root / _RUN_FILES
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir()
        self.origin.write_side_files(beside, None if self.lora else torch_dtype(self.args))
        manifest = read_manifest(self.origin.root)
        if manifest is not None:
            write_json(beside / MANIFEST, manifest)
        elif hasattr(self.origin.source, "tensors"):  # of a model directory
            shapes = {name: tensor.spec.shape for name, tensor in self.origin.source.tensors.items()}
            coverage = self.origin.bound.check(shapes, str(self.origin_dir))
            write_manifest(beside, self.origin.source, coverage)
        lm_args = self.args.megatron_lm_args()
        text = lm_args if isinstance(lm_args, str) else shlex.join(lm_args) + "\n"
        write_text_atomic(beside / MEGATRON_LM_ARGS, text)
        if self.lora:
            write_json(beside / ADAPTER_CONFIG, self.lora.peft_config)
        self.record(beside)
        move_files(beside, self.root)

    def record(self, directory: Path, base: Path | None = None) -> None:
        """Beside copied files of the model (or of those in `base`): arguments, the chat that was trained. Rank 0 only."""
        self.args.save(directory)
        if self.chat is not None:
            self.chat.write(directory, base)

    def write_adapter(self, directory: Path) -> None:
        """The adapter in PEFT's format beside a checkpoint that is being written, and what it was trained with."""
        assert self.lora is not None
        write_peft(directory, self.lora.peft_config, directory, self.origin)
        self.record(directory, self.origin.root)

    def prepare_hf(self, models: Sequence[Any], path: Path) -> tuple[list[Path], list[Write]]:
        """The Hugging Face directory of a checkpoint, if it is asked for. Collective."""
        if self.lora or not self.args.save_safetensors:
            return [], []
        directory = path.with_name(f"{path.name}{HF_SUFFIX}")
        return [directory], [prepare_hf_weights(models, directory, self.origin, record=self.record)[1]]

    def merge(self, path: Path) -> list[Path]:
        """Write the Hugging Face directory of a checkpoint of adapters, if it is asked for. Collective."""
        if not (self.lora and self.args.merge_lora):
            return []
        directory = path.with_name(f"{path.name}{HF_SUFFIX}")
        with tempfile.TemporaryDirectory() as scratch:
            adapter = open_adapter(path, self.origin.bound, Path(scratch), plain=False)
            merge_to_hf(
                self.origin_dir, adapter, directory, torch_dtype(self.args), self.args.new_tokens,
                record=self.record, exist_ok=True, allow_overflow=self.args.allow_overflow,
            )  # fmt: skip
        return [directory]

    def next_command(self, iteration: int) -> Sequence[object]:
        """Words of the command that uses the checkpoint of `iteration`."""
        args, path = self.args, self.root / checkpoint.iteration_name(iteration)
        directory = path.with_name(f"{path.name}{HF_SUFFIX}")
        if directory.is_dir():
            return "swiftlite", "infer", "--model", directory, *args.loading_words(hub=False)
        if not self.lora:
            return "swiftlite", "export", "--mcore_model", self.root, "--to_hf", "true"
        if args.mcore_model:
            words = ("--mcore_model", args.mcore_model, "--adapters", path, "--merge_lora", "true")
            return "swiftlite", "export", *words
        known = ("--model", args.model) if args.model else ()  # an adapter knows its base
        return "swiftlite", "infer", *known, "--adapters", path, *args.loading_words()
