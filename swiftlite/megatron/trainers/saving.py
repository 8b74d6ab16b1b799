"""The files of a run on megatron-core: next to its checkpoints, adapters and Hugging Face directories next to them."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from megatron.core.transformer.module import MegatronModule

from swiftlite.arguments.megatron_train import MegatronSftArguments
from swiftlite.checkpoint.adapter import Adapter
from swiftlite.checkpoint.chat import Beside
from swiftlite.checkpoint.checkpoint import Checkpoint
from swiftlite.checkpoint.new_tokens import copy_tokenizer
from swiftlite.checkpoint.side_files import write_megatron_lm_args
from swiftlite.convert.conversion import Options, convert, write_into
from swiftlite.convert.hf import SHARD_BYTES, CarriedPlan, HfTarget
from swiftlite.convert.peft import PeftTarget
from swiftlite.megatron import state as checkpoint
from swiftlite.megatron.background import Write
from swiftlite.megatron.hf_io import prepare_hf_weights
from swiftlite.megatron.model.config import torch_dtype
from swiftlite.megatron.tuners.lora_plan import LoraPlan
from swiftlite.utils.directories import ADAPTER_CONFIG, CARRIED
from swiftlite.utils.io import move_files, write_json

_RUN_FILES = ".run-files.saving"  # of a run's own directory, while they are made


class RunFiles:
    """Args: origin: what the run starts from. chat: what directories tell of it, on rank 0."""

    def __init__(
        self, args: MegatronSftArguments, origin: Checkpoint, lora: LoraPlan | None, chat: Beside | None
    ) -> None:
        self.args, self.origin = args, origin
        self.lora, self.chat = lora, chat
        self.root = Path(str(args.output_dir))

    def write(self) -> None:
        """Config, tokenizer, manifest and arguments next to the checkpoints, before the first one. Rank 0 only."""
        beside = self.root / _RUN_FILES
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir()
        self.origin.write_side_files(beside, None if self.lora else torch_dtype(self.args))
        self.origin.write_manifest(beside)
        write_megatron_lm_args(beside, self.args.megatron_lm_args())
        if not self.lora and not (self.root / CARRIED).is_dir():
            write_into(CarriedPlan(self.origin), beside)
        if self.lora:
            write_json(beside / ADAPTER_CONFIG, self.lora.peft_config)
        self.record(beside)
        move_files(beside, self.root)

    def record(self, directory: Path, base: Path | None = None) -> None:
        """Next to copied files of the model (or of those in `base`): arguments, the chat that was trained. Rank 0 only."""
        self.args.save(directory)
        if self.chat is not None:
            self.chat.write(directory, base)

    def write_adapter(self, directory: Path) -> None:
        """The adapter in PEFT's format next to a checkpoint that is being written, and what it was trained with."""
        assert self.lora is not None
        adapter = Adapter.trained(directory, self.lora.peft_config, self.origin.bound)
        plan = PeftTarget().plan(adapter)
        write_into(plan, directory)
        plan.publish(directory, {})
        if self.origin.new_tokens is not None:
            copy_tokenizer(self.origin.root, directory, self.origin.new_tokens.ids)
        self.record(directory, self.origin.root)

    def prepare_hf(self, models: Sequence[MegatronModule], path: Path) -> tuple[list[Path], list[Write]]:
        """The Hugging Face directory of a checkpoint, if it is asked for. Collective."""
        if self.lora or not self.args.save_safetensors:
            return [], []
        directory = checkpoint.hf_directory(path)
        return [directory], [prepare_hf_weights(models, directory, self.origin, record=self.record)[1]]

    def merge(self, path: Path) -> list[Path]:
        """Write the Hugging Face directory of a checkpoint of adapters, if it is asked for. Collective."""
        if not (self.lora and self.args.merge_lora):
            return []
        directory = checkpoint.hf_directory(path)
        merged = self.origin.merged(Adapter.open(path, self.origin.bound, plain=False))
        options = Options(exist_ok=True, allow_overflow=self.args.allow_overflow, record=self.record)
        convert(merged, HfTarget(torch_dtype(self.args), SHARD_BYTES), directory, options)
        return [directory]

    def next_command(self, iteration: int) -> Sequence[object]:
        """Words of the command that uses the checkpoint of `iteration`."""
        args, path = self.args, self.root / checkpoint.iteration_name(iteration)
        directory = checkpoint.hf_directory(path)
        if directory.is_dir():
            return "swiftlite", "infer", "--model", directory, *args.loading_words(hub=False)
        if not self.lora:
            return "swiftlite", "export", "--mcore_model", self.root, "--to_hf", "true"
        if args.mcore_model:
            words = ("--mcore_model", args.mcore_model, "--adapters", path, "--merge_lora", "true")
            return "swiftlite", "export", *words
        known = ("--model", args.model) if args.model else ()  # an adapter knows its base
        return "swiftlite", "infer", *known, "--adapters", path, *args.loading_words()
