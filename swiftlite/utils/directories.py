"""What a directory is: a model, an adapter, a Megatron checkpoint, a run. Looks at names only; imports nothing heavy."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from swiftlite.utils.errors import CheckpointError, UsageError

TRACKER = "latest_checkpointed_iteration.txt"
ADAPTER_CONFIG = "adapter_config.json"
REJECTS_FILE = "rejects.jsonl"
TEACHER_FILE = "teacher_logits.json"
# Beside Megatron's checkpoints: the tensors of a model's other parts than its text model, as Hugging Face files.
CARRIED = "carried"
_CHECKPOINT = re.compile(r"checkpoint-(\d+)|iter_(\d+)|v(\d+)-.*")


def _numbered(directory: Path, prefix: str) -> list[Path]:
    """Subdirectories like `checkpoint-20`, in the order of their numbers."""
    found = []
    for path in directory.glob(f"{prefix}*"):
        match = _CHECKPOINT.fullmatch(path.name)
        if match and path.is_dir():
            found.append((int(next(filter(None, match.groups()))), path))
    return [path for _, path in sorted(found)]


def read_tracker(directory: Path) -> tuple[str | None, str | None]:
    """(what the tracker file says, the directory that it names); None where there is no such file, where it names none."""
    try:
        with (directory / TRACKER).open("rb") as file:
            text = file.read(100).decode("ascii", "replace").strip()
    except OSError:
        return None, None
    number = text.isdecimal() and len(text) < 20
    return text, f"iter_{int(text):07d}" if number else text if text == "release" else None


@dataclass(frozen=True)
class Directory:
    """One existing directory, by the files in it."""

    path: Path

    def has(self, *patterns: str) -> bool:
        return any(next(self.path.glob(pattern), None) is not None for pattern in patterns)

    @cached_property
    def has_weights(self) -> bool:
        """Weights of a Hugging Face model, not of an adapter."""
        files = (*self.path.glob("*.safetensors"), *self.path.glob("*.bin"))
        return any(f.stem != "adapter_model" and f.name != "training_args.bin" for f in files)

    @cached_property
    def iteration(self) -> Path | None:
        """The `iter_*` directory that it is, or the newest whole one in it."""
        if self.has(".metadata"):
            return self.path
        _, name = read_tracker(self.path)
        named = self.path / (name or "none")
        whole = [p for p in _numbered(self.path, "iter_") if (p / ".metadata").is_file()]
        return named if name and (named / ".metadata").is_file() else whole[-1] if whole else None

    @property
    def is_peft(self) -> bool:
        return self.has(ADAPTER_CONFIG) and self.has("adapter_model.*")

    @cached_property
    def is_megatron_adapter(self) -> bool:
        beside = self.iteration is not None and (self.iteration.parent / ADAPTER_CONFIG).is_file()
        return beside or (self.iteration is not None and (self.iteration / ADAPTER_CONFIG).is_file())

    @property
    def is_megatron(self) -> bool:
        """A Megatron checkpoint of a whole model, also one whose tracker names an iteration that is not there."""
        return (self.iteration is not None or self.has(TRACKER)) and not self.is_megatron_adapter

    @property
    def is_hf(self) -> bool:
        return self.has("config.json") and self.has_weights

    @property
    def is_teacher_logits(self) -> bool:
        return self.has(TEACHER_FILE)

    @cached_property
    def newest(self) -> Directory | None:
        """The newest checkpoint of a run; that of the newest `v0-DATE` directory where there are such."""
        for prefix in ("checkpoint-", "v"):
            inside = _numbered(self.path, prefix)
            if inside:
                last = Directory(inside[-1])
                return last if prefix == "checkpoint-" else last.newest or last
        return None


def adapter_advice(found: Directory, model: str | None = None) -> str:
    """How an adapter is used."""
    base = f"its base model with --model{f' {model}' if model else ''}"
    if found.is_peft:
        return f"give it with --adapters {found.path}, and {base}"
    newest = Directory(found.iteration) if found.iteration is not None else None
    if newest is not None and newest.is_peft:
        return f"give its newest checkpoint with --adapters {newest.path}, and {base}"
    return f"give it with --mcore_adapter {found.path} (megatron sft, export), and {base}"


def what_it_is(directory: Path) -> tuple[str, str]:
    """(what a directory is, how it is used), both as parts of an error's line."""
    found = Directory(directory)
    if found.has(ADAPTER_CONFIG) and not found.is_peft and found.iteration is None:
        return f"has an {ADAPTER_CONFIG} but no adapter_model.safetensors", "copy it there, or name another directory"
    if found.is_megatron_adapter or found.has(ADAPTER_CONFIG):
        return "is a LoRA adapter" + (" of a Megatron run" if found.iteration else ""), adapter_advice(found)
    if found.is_hf:
        return "is a Hugging Face directory", f"give it with --model {directory}"
    if found.iteration is not None:
        name = found.iteration.name
        text = "is a Megatron checkpoint" + ("" if found.iteration == directory else f", the newest is {name}")
        ready = found.iteration.with_name(f"{name}-hf")
        if ready.is_dir():
            return text, f"its Hugging Face form is there: give --model {ready}"
        return text, (
            f"give it with --mcore_model {found.iteration} to `megatron sft` and `export`, or make a Hugging Face model "
            f"of it: swiftlite export --mcore_model {found.iteration} --to_hf true --output_dir {directory}-hf"
        )
    if found.has(TRACKER):
        return f"is a Megatron checkpoint without the iteration that {TRACKER} names", "copy it again"
    if found.newest is not None:
        newest = found.newest
        return f"is a training run, its newest checkpoint is {newest.path.name}", what_it_is(newest.path)[1]
    if found.has_weights and not found.has("config.json"):
        return "has weights but no config.json", "copy that of the model to it"
    if found.has("cached_dataset.json"):
        return "is tokenised data", f"give it with --cached_dataset {directory}"
    if found.is_teacher_logits:
        return "is what a teacher said", f"give it with --teacher_logits {directory}"
    if found.has("mp_rank_*", "iter_*/mp_rank_*"):
        return "has Megatron's old per-rank format", "save it as torch_dist first (--ckpt-format)"
    if found.has("config.json"):
        return "has a config.json but no weights (*.safetensors)", "copy them there, or name another directory"
    return "holds neither a model nor a checkpoint", "check the path"


def expect(flag: str, given: str | Path, *kinds: str) -> Path:
    """The directory as a path, if it is of one of the kinds: attributes of Directory, or "config" for a config.json.

    Args: flag: that named it; "" for a plain word.
    Raises: UsageError if it is absent; CheckpointError saying what it is instead, and how that is used.
    """
    path, where = Path(given).expanduser(), f"--{flag} {given}" if flag else str(given)
    if not path.is_dir():
        raise UsageError(f"{where}: {'is a file; give its directory' if path.exists() else 'no such directory'}")
    found = Directory(path)
    if any(found.has("config.json") if kind == "config" else getattr(found, kind) for kind in kinds):
        return path
    text, advice = what_it_is(path)
    raise CheckpointError(f"{where}: this {text}; {advice if flag else 'name a whole model, Hugging Face or Megatron'}")


def find_iteration(directory: Path) -> Path:
    """The `iter_*` directory of the newest complete checkpoint. Accepts the checkpoint root or the directory itself.

    Raises: CheckpointError saying what the directory is instead.
    """
    if (directory / ".metadata").is_file():
        return directory
    tracker, (text, name) = directory / TRACKER, read_tracker(directory)
    if text is not None:
        if name is None:
            raise CheckpointError(f"{tracker} holds {text!r}, which is not an iteration number")
        if not (directory / name / ".metadata").is_file():
            raise CheckpointError(f"{tracker} names iteration {text}, but {directory / name}/.metadata is not there")
        return directory / name
    if not directory.is_dir():
        raise CheckpointError(f"{directory}: no such directory; check the path")
    newest = Directory(directory).iteration
    if newest is not None:
        raise CheckpointError(f"{directory}: its {TRACKER} is missing; name the checkpoint itself, {newest}")
    text, advice = what_it_is(directory)
    raise CheckpointError(f"{directory}: no Megatron checkpoint, this {text}; {advice}")
