"""Arguments of `swiftlite megatron sft` and `swiftlite megatron pt`."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import ClassVar

from swiftlite.arguments.base import PEFT_TUNERS
from swiftlite.arguments.description import READ_FROM_CONFIG, ModelDescription
from swiftlite.arguments.export import PlanArguments, PushArguments, megatron_kinds
from swiftlite.arguments.parallel import MegatronArguments
from swiftlite.arguments.parser import Note, arguments, field
from swiftlite.arguments.train import BITSANDBYTES, OPTIMIZERS, PtArguments, SftArguments
from swiftlite.utils.errors import UsageError
from swiftlite.utils.logger import get_logger


@arguments
class MegatronSftArguments(PlanArguments, PushArguments, MegatronArguments, SftArguments):
    """Supervised fine-tuning on megatron-core"""

    COMMAND: ClassVar[str] = "megatron sft"
    NOTES: ClassVar[Mapping[str, Note]] = dict.fromkeys(
        READ_FROM_CONFIG, Note("rejected", "is read from the checkpoint's config.json; leave it out")
    )

    LATER: ClassVar[Collection[str]] = (
        "model_type",
        "mcore_adapter",
        "merge_lora",
        "system",
        "push_to_hub",
        "hub_model_id",
    )

    skip_train: bool = field(
        False, "train and write nothing: tell the losses of --val_dataset in this layout, then stop"
    )

    @property
    def directory_kinds(self) -> dict[str, tuple[str, ...]]:
        return megatron_kinds(self, self.mcore_model is None and not self.dry_run)

    @property
    def needs_megatron(self) -> bool:
        return True

    def __post_init__(self) -> None:
        super().__post_init__()
        if "moe_router_bias_update_rate" not in self.given:
            self.moe_router_bias_update_rate = 0.0
        if self.optim in BITSANDBYTES:
            raise UsageError(f"--optim {self.optim}: Megatron's optimizer has fp32 states; leave it out")
        if self.optim == "muon":
            raise UsageError("--optim muon: needs whole matrices, which Megatron's ranks share; use `swiftlite sft`")
        if self.optim not in OPTIMIZERS:
            raise UsageError(f"--optim {self.optim}: Megatron divides Adam's states alone; use `swiftlite sft`")
        if self.train_type in PEFT_TUNERS:
            raise UsageError(
                f"--train_type {self.train_type}: peft's layers fit transformers only; use `swiftlite sft`"
            )
        if self.push_to_hub and self.train_type == "lora" and not self.merge_lora:
            raise UsageError("--push_to_hub true: pushes whole models; add --merge_lora true")
        if self.push_to_hub:
            self.save_safetensors = True
        if self.model is None and self.mcore_model is None:
            raise UsageError("give the weights with --model HF_DIR_OR_ID or --mcore_model DIR (a converted checkpoint)")
        if self.pools and self.mtp_num_layers:
            raise UsageError(f"--mtp_num_layers: --task_type {self.task_type} predicts no tokens; leave it out")
        if self.train_type == "lora":
            if self.moe_shared_expert_overlap:
                get_logger().info("--moe_shared_expert_overlap: off, adapters exchange activations by themselves")
            self.moe_shared_expert_overlap = False
        elif self.adapters or self.mcore_adapter or self.merge_lora:
            raise UsageError("--adapters, --mcore_adapter and --merge_lora: need --train_type lora")
        if self.skip_train:
            for name in ("dataset", "cached_dataset", "cached_val_dataset", "streaming", "push_to_hub"):
                if getattr(self, name):
                    raise UsageError(f"--skip_train true: evaluates --val_dataset alone; leave out --{name}")
            if not self.val_dataset:
                raise UsageError("--skip_train true: give the data with --val_dataset FILE")

    def _describe(self, model: ModelDescription) -> None:
        super()._describe(model)
        unused, rate = None, self.moe_router_bias_update_rate
        if not model.moe_router_enable_expert_bias:
            unused = "the model's routers have none"
        elif model.moe_router_score_function != "sigmoid":
            unused = "this model's routers keep the bias that they were trained with"
        elif self.train_type == "lora":
            unused = "adapters cannot hold it, so it stays as the model has it"
        if unused and rate:
            get_logger().warning("--moe_router_bias_update_rate %s: no effect on experts' bias, %s", rate, unused)
            self.moe_router_bias_update_rate = 0.0


@arguments
class MegatronPtArguments(MegatronSftArguments, PtArguments):
    """Continued pre-training on megatron-core: rows with `text`, ended by the end token, packed, trained on as a whole"""

    COMMAND: ClassVar[str] = "megatron pt"
