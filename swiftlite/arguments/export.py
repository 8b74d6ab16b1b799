"""Arguments of `swiftlite export`: conversion both ways, merging of adapters."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, ClassVar

from swiftlite.arguments.base import PLUGINS, BaseArguments, normalize_dtype
from swiftlite.arguments.flags import EXPORT_NOTES, NO_QUANTISING
from swiftlite.arguments.parser import Arguments, Note, arguments, field
from swiftlite.arguments.task import TeacherArguments
from swiftlite.utils.errors import UsageError

if TYPE_CHECKING:
    import torch

# What ms-swift and Megatron call a scale for 128 x 128 numbers.
FP8_CALLED = {"fp8": "block", "blockwise": "block"}
_NO_TEACHER = (
    "--to_teacher_logits true asks a whole Hugging Face model; merge or convert it first (--merge_lora, --to_hf)"
)
_NOT_TAUGHT = {
    "packing": "the teacher reads sample by sample, and its answers serve packed training too; leave it out",
    "dry_run": "--to_teacher_logits true has no plan; leave it out",
}
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
          "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}  # fmt: skip


def parse_bytes(text: str, flag: str, least: int = 1) -> int:
    """`5GB` -> 5_000_000_000, `4GiB` -> 4 * 2**30; a bare number is bytes. Raises: UsageError, also below `least`."""
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([KMGT]?I?B?)\s*", str(text).upper())
    unit = match.group(2) if match else None
    if unit is not None and unit and not unit.endswith("B"):
        unit += "B"
    if match is None or unit not in _UNITS:
        raise UsageError(f"--{flag} {text}: must be a size like 5GB, 512MB or 4GiB")
    size = int(float(match.group(1)) * _UNITS[unit])
    if size < least:
        number = match.group(1)
        raise UsageError(f"--{flag} {text}: is {size} bytes" + (f"; write {number}GB" if not unit else ", too few"))
    return size


@arguments
class McoreArguments(Arguments):
    """Megatron checkpoints: where torch_dist weights come from"""

    mcore_model: str | None = field(
        None, "directory with latest_checkpointed_iteration.txt", aliases=["load"], path=True, common=True
    )
    mcore_adapter: str | None = field(
        None, "adapter checkpoint of a Megatron run", aliases=["adapter_load"], path=True, common=True
    )


def megatron_kinds(args: McoreArguments, reads_model: bool) -> dict[str, tuple[str, ...]]:
    """`directory_kinds` of a command that takes both formats. reads_model: --model's weights, not only its config."""
    adapter = ("is_peft", "is_megatron_adapter")
    return {
        "model": ("is_hf" if reads_model else "config",),
        "mcore_model": ("is_megatron",),
        "adapters": adapter,
        "mcore_adapter": adapter,
    }


@arguments
class PlanArguments(Arguments):
    """Plan: what a command will do and take, without doing it"""

    RESUME: ClassVar[str] = "may change"

    dry_run: bool = field(
        False,
        "show the plan (bytes, files, memory, time, layouts that fit) and stop; needs config.json, no weights",
        common=True,
    )
    gpus: int | None = field(None, "with --dry_run true: GPUs to train on (default: NPROC_PER_NODE x NNODES)", least=1)
    gpu_memory: str = field("80GB", "with --dry_run true: memory of each GPU")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("gpus", "gpu_memory"):
            if name in self.given and not self.dry_run:
                raise UsageError(f"--{name} {getattr(self, name)}: belongs to the plan; add --dry_run true")
        parse_bytes(self.gpu_memory, "gpu_memory", 10**9)

    @property
    def gpu_memory_bytes(self) -> int:
        return parse_bytes(self.gpu_memory, "gpu_memory", 10**9)


@arguments
class PushArguments(Arguments):
    """Push: the Hugging Face directory that a command has written goes to a hub"""

    RESUME: ClassVar[str] = "may change"

    push_to_hub: bool = field(
        False, "upload the Hugging Face directory to ModelScope, with --use_hf true to Hugging Face", common=True
    )
    hub_model_id: str | None = field(None, "ORGANISATION/NAME there", common=True)
    hub_private_repo: bool = field(False, "a repository that is made for it is private")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.push_to_hub and not self.hub_model_id:
            raise UsageError("--push_to_hub true: say where with --hub_model_id ORGANISATION/NAME")
        if not self.push_to_hub and (self.hub_model_id or self.hub_private_repo):
            raise UsageError("--hub_model_id and --hub_private_repo: belong to --push_to_hub true")


@arguments
class ExportArguments(PlanArguments, PushArguments, TeacherArguments, McoreArguments, BaseArguments):
    """Export: what is converted and how it is checked"""

    NOTES: ClassVar[Mapping[str, Note]] = {
        **EXPORT_NOTES,
        **dict.fromkeys(
            ("cached_dataset", "cached_val_dataset"),
            Note("rejected", "export writes one, with --to_cached_dataset true"),
        ),
        **dict.fromkeys(("streaming", "shuffle_buffer_size"), Note("rejected", "export reads whole datasets")),
        "group_by_length": Note("rejected", "has no effect on export"),
    }
    LATER: ClassVar[Collection[str]] = ("template", "system", "max_length", "loss_scale", "val_dataset",
                                        "split_dataset_ratio", "packing", "attention_backend")  # fmt: skip

    to_mcore: bool = field(False, "Hugging Face -> Megatron-core torch_dist", common=True)
    to_hf: bool = field(False, "Megatron-core torch_dist -> Hugging Face", common=True)
    fp8: str | None = field(
        None,
        "with --to_hf true (from either format, the default) or --merge_lora true: write matrices in FP8, with a scale for "
        "128 x 128 numbers (also called fp8 and blockwise), a row or a tensor",
        aliases=["quant_method", "fp8_recipe"],
        choices=["block", "channel", "tensor", *FP8_CALLED],
        elsewhere={
            **dict.fromkeys(("delayed", "tensorwise", "mxfp8"), "is how a run multiplies; use block"),
            **dict.fromkeys(("awq", "bnb", "gptq", "gptq_v2", "hqq"), NO_QUANTISING),
        },
        common=True,
    )
    to_cached_dataset: bool = field(
        False, "write --dataset as token ids, which both trainers read by memory map", common=True
    )
    template_mode: str = field(
        "train", "with --to_cached_dataset true: samples of sft and pt, preference pairs (rlhf) or labelled answers (kto)",
        choices=["train", "rlhf", "kto"],
    )  # fmt: skip
    to_teacher_logits: bool = field(
        False, "have --teacher_model (default: --model) answer --dataset, tokenised as --model reads it, and write what it "
        "thinks of each token of an answer, for `rlhf --rlhf_type gkd --teacher_logits DIR`; the same command goes on where "
        "it stopped", common=True,
    )  # fmt: skip
    teacher_topk: int = field(
        64, "with --to_teacher_logits true: so many likeliest tokens are kept one by one, the others as one", least=1
    )
    test_convert_precision: bool = field(
        False, "run both models on one conversation and fail where they disagree", common=True
    )
    test_convert_dtype: str = field("float32", "dtype of that run")
    thread_count: int | None = field(
        None, "number of torch_dist files (default: about 10 GB each, at least 2)", least=1
    )
    max_shard_size: str = field("5GB", "largest safetensors file", common=True)
    max_memory: str | None = field(
        None, "memory for blocks in flight, like 4GB (default: 3 MB for each of two threads a core)"
    )
    verify: str = field(
        "names", "check afterwards: names and shapes, or every byte both ways", choices=["none", "names", "bitwise"],
        common=True,
    )  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_data()
        if self.push_to_hub and (self.to_mcore or self.trains):
            raise UsageError(
                "--push_to_hub true: pushes Hugging Face directories; not with --to_mcore, --to_cached_dataset and "
                "--to_teacher_logits"
            )
        if self.fp8:
            self.fp8 = FP8_CALLED.get(self.fp8, self.fp8)
            others = (self.to_mcore, self.to_cached_dataset, self.merge_lora, self.push_to_hub, self.adapters)
            self.to_hf = self.to_hf or bool(self.model and not (any(others) or self.mcore_adapter))  # what else
            self._check_fp8(self.fp8)
        if self.to_mcore and self.to_hf:
            raise UsageError("--to_mcore true and --to_hf true: give one direction")
        if self.to_hf and not (self.mcore_model or self.mcore_adapter or self.adapters or (self.fp8 and self.model)):
            raise UsageError("--to_hf true: give the Megatron checkpoint with --mcore_model DIR")
        if self.to_mcore and not (self.model or self.adapters or self.mcore_adapter):
            raise UsageError("--to_mcore true: give the Hugging Face checkpoint with --model DIR_OR_ID")
        self.test_convert_dtype = normalize_dtype(self.test_convert_dtype, "test_convert_dtype") or "float32"
        parse_bytes(self.max_shard_size, "max_shard_size", 1000)
        if self.max_memory is not None:
            parse_bytes(self.max_memory, "max_memory")
        if self.max_length is None:
            self.max_length = 2048

    def _check_data(self) -> None:
        flag = "to_cached_dataset" if self.to_cached_dataset else "to_teacher_logits"
        if self.trains and (self.to_mcore or self.to_hf or self.merge_lora):
            raise UsageError(f"--{flag} true: converts no model; leave out --to_mcore, --to_hf and --merge_lora")
        if self.to_cached_dataset and self.to_teacher_logits:
            raise UsageError("--to_cached_dataset and --to_teacher_logits: one at a time; both read --dataset")
        for name in ("teacher_model", "temperature", "teacher_topk"):
            if name in self.given and not self.to_teacher_logits:
                raise UsageError(f"--{name}: goes with --to_teacher_logits true only")
        for name in ("packing", "adapters", "mcore_model", "mcore_adapter", "dry_run"):
            if self.to_teacher_logits and getattr(self, name):
                raise UsageError(f"--{name}: {_NOT_TAUGHT.get(name, _NO_TEACHER)}")
        if self.dataset and not self.trains:
            raise UsageError("--dataset: converting a model reads no data; --to_cached_dataset true tokenises it")
        if self.template_mode != "train":
            if self.to_teacher_logits:
                raise UsageError(
                    f"--template_mode {self.template_mode}: --rlhf_type gkd trains on the samples of sft; leave it out"
                )
            if "loss_scale" not in self.given:
                self.loss_scale = "last_round"  # as preference training has it
            if self.packing:
                raise UsageError("--packing true: answers and pairs are packed where they are trained on; leave it out")

    def _check_fp8(self, form: str) -> None:
        adapter = (self.adapters or self.mcore_adapter) and not self.merge_lora
        pushed = self.push_to_hub and not (self.to_hf or self.merge_lora)
        if self.to_mcore or adapter or pushed:
            raise UsageError(f"--fp8 {form}: writes a Hugging Face model; add --to_hf true, or --merge_lora true")
        if self.test_convert_precision:
            raise UsageError(
                f"--fp8 {form}: rounds weights, so the models differ; leave out --test_convert_precision: every number is "
                "held against what it was made of"
            )

    @property
    def directory_kinds(self) -> dict[str, tuple[str, ...]]:
        reads = self.to_mcore or self.merge_lora or self.push_to_hub or self.fp8
        # An adapter's base is read for its config only, unless both sides are computed.
        adapter = (self.adapters or self.mcore_adapter) and not (self.merge_lora or self.test_convert_precision)
        kinds = megatron_kinds(self, bool(reads and not adapter and self.mcore_model is None and not self.dry_run))
        return {**kinds, "teacher_model": ("is_hf",)}

    @property
    def needs_megatron(self) -> bool:
        return self.test_convert_precision

    @property
    def trains(self) -> bool:
        return self.to_cached_dataset or self.to_teacher_logits

    @property
    def written_dtype(self) -> torch.dtype | None:
        """What all weights are converted to, None: nothing was asked for."""
        return self.dtype if "torch_dtype" in self.given else None

    @property
    def max_shard_bytes(self) -> int:
        return parse_bytes(self.max_shard_size, "max_shard_size")

    @property
    def max_memory_bytes(self) -> int | None:
        return None if self.max_memory is None else parse_bytes(self.max_memory, "max_memory")


@arguments
class VerifyArguments(Arguments):
    """Verify: are two checkpoints the same?"""

    POSITIONAL: ClassVar[str | None] = "directories"

    directories: list[str] = field([], "two checkpoints, Hugging Face or Megatron, in either order", path=True)
    quick: bool = field(False, "compare recorded hashes where a checkpoint has them, instead of reading its weights")
    custom_register_path: list[str] = field([], PLUGINS, aliases=["external_plugins"], path=True)
    debug: bool = field(False, "show the traceback of an error")

    @property
    def directory_kinds(self) -> dict[str, tuple[str, ...]]:
        return {"directories": ("is_hf", "is_megatron")}

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.directories) != 2:
            raise UsageError(
                f"verify compares two checkpoints, {len(self.directories)} given: swiftlite verify DIR_A DIR_B"
            )


@arguments
class CheckArguments(Arguments):
    """Check: does this kind of model convert and compute right? With --parity true: does it train the same on both sides?"""

    model: str | None = field(None, "directory or hub id; only its config.json is read, except by --parity", path=True)
    model_type: str | None = field(None, "registered type, or all; tests a small config of the type")
    parity: bool = field(
        False, "train with transformers and on Megatron from one start on the same batches, and compare"
    )
    dataset: list[str] = field([], "with --parity: data that both train on", path=True)
    shrink: bool = field(False, "with --parity: train a small random model of the same shape class instead")
    train_type: str = field("full", "with --parity: what is trained", aliases=["tuner_type"], choices=["full", "lora"])
    rlhf_type: str | None = field(
        None, "with --parity: training on preference pairs, or on labelled answers, instead", choices=["dpo", "kto"]
    )
    train_iters: int = field(20, "with --parity: steps", aliases=["max_steps"])
    lr: float | None = field(
        None, "with --parity: highest learning rate (default 1e-3, with LoRA 3e-3)", aliases=["learning_rate"]
    )
    max_length: int = field(256, "with --parity: longer samples are cut at the left")
    template: str | None = field(None, "with --parity: chat template (default: the model's own)")
    use_hf: bool = field(False, "ask Hugging Face instead of ModelScope")
    hub_token: str | None = field(None, "access token of the hub")
    trust_remote_code: bool = field(False, "allow Python code that a checkpoint brings to run")
    custom_register_path: list[str] = field([], PLUGINS, aliases=["external_plugins"], path=True)
    debug: bool = field(False, "show the traceback of an error")

    @property
    def directory_kinds(self) -> dict[str, tuple[str, ...]]:
        return {"model": ("is_hf" if self.parity and not self.shrink else "config",)}

    @property
    def needs_megatron(self) -> bool:
        return True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.parity:
            if self.lr is None:
                self.lr = 1e-3 if self.train_type == "full" else 3e-3
            if self.model is None or not self.dataset:
                raise UsageError("check --parity true: give --model DIR_OR_ID and --dataset FILE")
            return
        trained = sorted(
            {"dataset", "shrink", "train_type", "rlhf_type", "train_iters", "lr", "max_length", "template"} & self.given
        )
        if trained:
            raise UsageError(f"--{trained[0]}: goes with --parity true only")
        if (self.model is None) == (self.model_type is None):
            raise UsageError("check: give --model DIR_OR_ID or --model_type TYPE (or all)")
