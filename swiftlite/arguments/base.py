"""The parts that commands are made of: model, template, data, tuner, generation, run; and BaseArguments.

Values are plain (text, numbers, lists, dicts): torch is not imported here. `__post_init__` checks and normalises and
has no side effects; what needs files or the hub is added later by `swiftlite.checkpoint.resolve.resolve(args)`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from swiftlite import __version__
from swiftlite.arguments.flags import COMMON_NOTES, NO_BIASES, NO_WEIGHTS, ONLY_TRANSFORMERS
from swiftlite.arguments.parser import Arguments, Note, arguments, convert, field, run_setting, specs
from swiftlite.arguments.task import TaskArguments
from swiftlite.utils.errors import UsageError
from swiftlite.utils.secrets import SETTINGS, remember, without_secrets
from swiftlite.utils.types import Json

if TYPE_CHECKING:
    from pathlib import Path

    import torch

DTYPES = {
    "bfloat16": "bfloat16", "bf16": "bfloat16", "float16": "float16", "fp16": "float16", "half": "float16",
    "float32": "float32", "fp32": "float32", "float": "float32",
}  # fmt: skip

# What may be typed -> Megatron's `attention_backend` (None: no such kernels) and transformers' `attn_implementation`
# (None: its own choice).
ATTENTION: dict[str, tuple[str | None, str | None]] = {
    "auto": ("auto", None), "flash": ("flash", "flash_attention_2"), "fused": ("fused", "sdpa"),
    "unfused": ("unfused", "eager"), "local": ("local", "eager"), "flash_attn": ("flash", "flash_attention_2"),
    "flash_attention_2": ("flash", "flash_attention_2"), "flash_attention_3": ("flash", "flash_attention_3"),
    "sdpa": ("fused", "sdpa"), "eager": ("unfused", "eager"), "flex_attention": (None, "flex_attention"),
    "fa2": ("flash", "flash_attention_2"), "disabled": ("unfused", "eager"),
}  # fmt: skip


# Other libraries' names of layers in --target_modules and --modules_to_save -> Hugging Face's.
MODULES_CALLED = {
    "linear_qkv": ("q_proj", "k_proj", "v_proj"), "linear_proj": ("o_proj",), "linear_fc1": ("gate_proj", "up_proj"),
    "linear_fc2": ("down_proj",), "all": ("all-linear",), "word_embeddings": ("embed_tokens",), "output_layer": ("lm_head",),
    "final_layernorm": ("model.norm",),
}  # fmt: skip

# Adapters of peft besides LoRA, as --train_type and as peft names them. With transformers only.
PEFT_TUNERS = {
    "boft": "BOFT", "bone": "MISS", "fourierft": "FOURIERFT", "hra": "HRA", "ia3": "IA3", "loha": "LOHA", "lokr": "LOKR",
    "oft": "OFT", "vera": "VERA",
}  # fmt: skip

OTHER_TUNERS = {
    "adalora": "peft moves its ranks by a schedule of their own, which a resumed run would lose; use lora",
    "adapter": "layers of ms-swift's own, which no other tool loads; use lora",
    "longlora": "attention of ms-swift's own; use lora, with --max_length as it is or --sequence_parallel_size",
    "llamapro": "adds layers of its own; use lora, or freeze with --trainable_parameters",
    "reft": "a package of its own trains it; use lora",
    "dummy": "trains nothing; use freeze with --trainable_parameters",
}


def normalize_dtype(value: object, flag: str = "torch_dtype") -> str | None:
    """`bf16`, `torch.bfloat16`, `torch.bfloat16` the object -> "bfloat16"; None and "auto" -> None.

    Raises: UsageError for a dtype that weights cannot be trained or converted in.
    """
    if value is None or value == "auto":
        return None
    name = DTYPES.get(str(value).removeprefix("torch."))
    if name is None:
        raise UsageError(f"--{flag} {value}: must be bfloat16, float16 or float32")
    return name


@arguments
class RunArguments(Arguments):
    """Run: where results go, seed, precision, kernels"""

    output_dir: str | None = run_setting(
        None, "directory that is written", aliases=["save", "export_dir"], path=True, common=True
    )
    seed: int = field(
        42, "seed of weights' initialisation, data order and dropout", common=True,
        unavailable={"ExportArguments": Note("default", "conversion draws no random numbers")},
    )  # fmt: skip
    torch_dtype: str | None = field(
        None, "dtype of the weights: bfloat16, float16 or float32 (default: what config.json says)", aliases=["dtype"],
        common=True,
    )  # fmt: skip
    allow_overflow: bool = run_setting(False, "continue where finite values become infinite in --torch_dtype")
    attention_backend: str | None = run_setting(
        None,
        "attention kernels: auto, flash, fused, unfused, local, or Hugging Face's flash_attention_2, sdpa, eager "
        "(default: the fastest that is there)",
        aliases=["attn_impl", "attn_implementation", "flash_attn"],
        common=True,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.torch_dtype = normalize_dtype(self.torch_dtype)
        if self.attention_backend is not None:
            backends = {name: backend for name, (backend, _) in ATTENTION.items() if backend is not None}
            if self.attention_backend not in backends:
                raise UsageError(f"--attention_backend {self.attention_backend}: must be one of {', '.join(backends)}")
            self.attention_backend = backends[self.attention_backend]

    def set_dtype(self, dtype: str | None) -> None:
        """Settle the dtype after the arguments were read, by what the checkpoint says."""
        self.torch_dtype = dtype

    @property
    def hf_attn_implementation(self) -> str | None:
        """`attn_implementation` for transformers, None for its own choice."""
        return ATTENTION[self.attention_backend or "auto"][1]

    @property
    def dtype(self) -> torch.dtype | None:
        """`torch_dtype` as an object, None while it is not known."""
        if self.torch_dtype is None:
            return None
        import torch

        return getattr(torch, self.torch_dtype)  # type: ignore[no-any-return]


@arguments
class ModelArguments(TaskArguments):
    """Model: which checkpoint, and how it is read"""

    model: str | None = field(
        None, "directory, ModelScope id, or Hugging Face id with --use_hf true",
        aliases=["model_name_or_path", "model_id_or_path"], path=True, common=True,
    )  # fmt: skip
    model_type: str | None = field(
        None, "registered type; needed only where the directory does not settle it", common=True
    )
    model_revision: str | None = field(None, "branch, tag or commit on the hub", aliases=["revision"])
    use_hf: bool = run_setting(False, "download from Hugging Face instead of ModelScope", common=True)
    hub_token: str | None = run_setting(None, "access token of the hub")
    new_special_tokens: list[str] = field([], "tokens to add; an item that ends in .txt is a file of tokens")
    device_map: object = run_setting(
        None,
        "where transformers puts the layers: auto, cpu, cuda:0 or a JSON map",
        unavailable={
            "ExportArguments": Note(
                "default", "conversion streams on the CPU, and the precision check chooses its device"
            ),
            "MegatronArguments": Note(
                "rejected", "megatron-core places the model: one process per device (NPROC_PER_NODE)"
            ),
            "PreviewArguments": NO_WEIGHTS,
        },
    )
    trust_remote_code: bool = field(False, "allow Python code that a checkpoint brings to run")
    ignore_requirements: bool = run_setting(
        False, "continue although a package version that the model asks for is missing"
    )
    adapters: list[str] = field(
        [], "directories of LoRA adapters in PEFT's format", aliases=["adapter_name_or_path"], path=True, common=True
    )
    merge_lora: bool | None = field(
        None,
        "add LoRA weights into the model that is written",
        common=True,
        unavailable={
            "MegatronArguments": None,
            "SftArguments": "merge afterwards with `swiftlite export --merge_lora true`",
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        remember(self.hub_token)
        if isinstance(self.device_map, str) and self.device_map.startswith("{"):
            self.device_map = convert(self.device_map, dict, "device_map")

    @property
    def directory_kinds(self) -> dict[str, tuple[str, ...]]:
        return {"model": ("is_hf",), "adapters": ("is_peft",)}

    def loading_words(self, hub: bool = True) -> list[str]:
        """What a later command needs to load this model as well. hub: it is named as it was here, perhaps on a hub."""
        names = (*(("use_hf", "model_revision") if hub else ()), "trust_remote_code", "ignore_requirements")
        given = {name: getattr(self, name) for name in names if getattr(self, name)}
        plugins = getattr(self, "custom_register_path", [])
        words = [word for n, v in given.items() for word in (f"--{n}", "true" if v is True else str(v))]
        return [*words, *(["--custom_register_path", *plugins] if plugins else [])]


@arguments
class TemplateArguments(Arguments):
    """Template: how a conversation becomes tokens"""

    template: str | None = field(
        None,
        "registered chat template (default: the checkpoint's own; the model type's where it has none)",
        aliases=["template_type"],
        common=True,
    )
    system: str | None = field(None, "system message where a conversation has none", common=True)
    max_length: int | None = field(
        None, "longest sample in tokens (default: what the model allows; export 2048)", aliases=["cutoff_len"],
        common=True, least=1,
    )  # fmt: skip
    truncation_strategy: str = field(
        "delete", "what happens to longer samples", choices=["delete", "left", "right", "split", "raise"]
    )
    max_pixels: int | None = field(None, "largest image; without effect for text models")
    agent_template: str | None = field(None, "format of tool calls (default: the template's own)")
    norm_bbox: str | None = field(None, "how boxes are normalised; without effect for text models")
    use_chat_template: bool = field(True, "false: plain text, as base models read it")
    padding_free: bool | None = field(None, "join the samples of a batch into one sequence without padding")
    padding_side: str = field("right", "side that shorter samples are padded on", choices=["left", "right"])
    loss_scale: str = field(
        "default", "which tokens are trained on: default (all answers), last_round, all, with +NAME for more",
        common=True,
    )  # fmt: skip
    response_prefix: str | None = field(None, "text that each answer starts with (default: the template's own)")
    template_backend: str = field(
        "auto",
        "whose chat template: jinja, the checkpoint's own; swift, a registered one; auto: --template NAME if given, else "
        "the checkpoint's own, else the model type's",
        choices=["auto", "swift", "jinja"],
    )
    enable_thinking: bool | None = field(None, "ask a thinking model to think or not to think")
    add_non_thinking_prefix: bool = field(
        True, "train answers without thoughts with the empty thought block that the template writes before them"
    )
    strict_template: bool = run_setting(
        False, "fail where the template differs from the checkpoint's own chat template"
    )

    def get_template_kwargs(self) -> Json:
        """Keyword arguments of `get_template`, 14 entries.

        `delete` becomes `raise`: the template reports a sample that is too long and the dataset drops it.
        """
        return {
            "default_system": self.system,
            "max_length": self.max_length,
            "truncation_strategy": "raise" if self.truncation_strategy == "delete" else self.truncation_strategy,
            "max_pixels": self.max_pixels,
            "agent_template": self.agent_template,
            "norm_bbox": self.norm_bbox,
            "use_chat_template": self.use_chat_template,
            "remove_unused_columns": True,
            "padding_free": bool(self.padding_free),
            "padding_side": self.padding_side,
            "loss_scale": self.loss_scale,
            "sequence_parallel_size": max(
                getattr(self, name, 1) for name in ("context_parallel_size", "sequence_parallel_size")
            ),
            "response_prefix": self.response_prefix,
            # Whether `auto` means the checkpoint's own is seen where its tokenizer is read; records name the type's.
            "template_backend": "swift" if self.template_backend == "auto" else self.template_backend,
        }


@arguments
class DataArguments(Arguments):
    """Data: what is trained or run on"""

    dataset: list[str] = field(
        [], "files, directories, registered names or hub ids: [hf::|ms::]ID[:SUBSET/SUBSET][#N], N rows of it; #<N at most",
        path=True, common=True,
    )  # fmt: skip
    val_dataset: list[str] = field([], "what is evaluated or answered, named like a --dataset", path=True, common=True)
    split_dataset_ratio: float = field(
        0.0, "share of the dataset kept for evaluation where --val_dataset is absent",
        aliases=["val_size"], common=True, least=0, most=1,
    )  # fmt: skip
    columns: dict[str, str] = field({}, 'renames columns, like \'{"text1": "query"}\'')
    dataset_info: list[str] = field([], "JSON files that name datasets", aliases=["custom_dataset_info"], path=True)
    dataset_dir: str | None = field(None, "same as --dataset_info DIR/dataset_info.json", path=True)
    max_samples: int | None = field(None, "same as #<N behind each dataset that has no number", least=1)
    interleave_prob: list[float] = field(
        [], "draw from the datasets with these probabilities, one for each", aliases=["interleave_probs"]
    )
    stopping_strategy: str = field(
        "first_exhausted", "end of such a mixture", choices=["first_exhausted", "all_exhausted"]
    )
    streaming: bool = field(False, "read and tokenise while training runs; needs --train_iters")
    shuffle_buffer_size: int = field(
        1000, "rows that are shuffled and packed together when streaming", aliases=["buffer_size"], least=1
    )
    load_from_cache_file: bool = run_setting(
        False,
        "keep tokenised data between runs, by content",
        unavailable={"DpoArguments": Note("default", "pairs are tokenised for each run")},
    )
    cached_dataset: list[str] = field(
        [], "directories that `export --to_cached_dataset true` wrote, also DIR/train of one", path=True
    )
    cached_val_dataset: list[str] = field(
        [], "directories of the same kind for evaluation, also DIR/val of one (default: the parts `val` of the others)",
        path=True,
    )  # fmt: skip
    dataset_num_proc: int = run_setting(
        1, "processes that read and tokenise", aliases=["preprocessing_num_workers"], least=1
    )
    max_drop_ratio: float = field(0.05, "stop when a larger share of the rows cannot be used", least=0, most=1)
    data_seed: int | None = field(None, "seed of the data order (default: --seed)")
    dataset_shuffle: bool = field(True, "shuffle the training rows")
    model_name: list[str] = field([], "name that self-cognition rows teach the model")
    model_author: list[str] = field([], "author that self-cognition rows teach the model")
    packing: bool = field(False, "fill each training sequence with several samples", common=True)
    packing_strategy: str = field(
        "binpack", "binpack: samples that fit best share a sequence; sequential: neighbours do",
        choices=["binpack", "sequential"],
    )  # fmt: skip
    packing_length: int | None = field(None, "tokens of a packed sequence (default: --max_length)", least=1)
    group_by_length: bool = field(False, "make batches of samples of similar length")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("dataset", "val_dataset"):  # LLaMA-Factory's are listed with commas
            words = [w for word in getattr(self, name) for w in ([word] if os.path.exists(word) else word.split(","))]
            most = f"#<{self.max_samples}"
            setattr(self, name, [word if self.max_samples is None or "#" in word else word + most for word in words])
        if self.dataset_dir:
            self.dataset_info = [*self.dataset_info, os.path.join(self.dataset_dir, "dataset_info.json")]
        if self.cached_dataset and (self.dataset or self.val_dataset):
            raise UsageError("--cached_dataset: holds the data already; leave out --dataset and --val_dataset")
        if self.cached_val_dataset and not self.cached_dataset:
            raise UsageError("--cached_val_dataset: goes with --cached_dataset; name other data with --val_dataset")
        if self.streaming and self.split_dataset_ratio:
            raise UsageError("--streaming true: a stream cannot be split; name the validation data with --val_dataset")
        if self.streaming and (self.group_by_length or self.load_from_cache_file or self.cached_dataset):
            raise UsageError(
                "--streaming true: goes with neither --group_by_length, --load_from_cache_file nor --cached_dataset"
            )
        if self.packing_strategy == "sequential" and (not self.packing or self.cached_dataset):
            raise UsageError(
                "--packing_strategy sequential: needs --packing true, and --dataset instead of --cached_dataset"
            )
        if self.packing and self.group_by_length:
            raise UsageError("--packing true: packed sequences have one length; leave out --group_by_length")
        if self.data_seed is None:
            self.data_seed = self.seed if hasattr(self, "seed") else 42


@arguments
class TunerArguments(Arguments):
    """Tuner: which parameters are trained"""

    train_type: str = field(
        "full", "all parameters, adapters added to them (LoRA, or others of peft with transformers), or some of them",
        aliases=["tuner_type", "finetuning_type"], choices=["full", "lora", "freeze", "lora_llm", *PEFT_TUNERS], common=True,
        elsewhere=OTHER_TUNERS,
    )  # fmt: skip
    tuner_settings: dict[str, object] = field(
        {}, 'settings of peft\'s config for adapters other than LoRA, like \'{"boft_block_size": 8}\'',
        unavailable=ONLY_TRANSFORMERS,
    )  # fmt: skip
    freeze_parameters: list[str] = field([], "prefixes of parameters that stay as they are")
    freeze_parameters_regex: str | None = field(None, "regular expression of parameters that stay as they are")
    freeze_parameters_ratio: float = field(
        0.0, "share of the parameters, from the bottom, that stay as they are", least=0, most=1
    )
    trainable_parameters: list[str] = field([], "prefixes of parameters that are trained although frozen otherwise")
    trainable_parameters_regex: str | None = field(None, "regular expression of parameters that are trained anyway")
    target_modules: list[str] = field(
        ["all-linear"], "layers that get LoRA, by Hugging Face name (linear_qkv and Megatron's other names stand for those)",
        aliases=["lora_target"], common=True,
    )  # fmt: skip
    target_regex: str | None = field(None, "regular expression of layers that get LoRA")
    modules_to_save: list[str] = field(
        [], "layers that are trained fully, besides LoRA: embed_tokens, lm_head, norm, a router (gate)",
        aliases=["additional_target"],
    )  # fmt: skip
    lora_rank: int = field(8, "LoRA rank", common=True, least=1)
    lora_alpha: int = field(32, "LoRA scale times rank", common=True)
    lora_dropout: float = field(0.05, "dropout before LoRA")
    lora_bias: str = field(
        "none", "which biases are trained with LoRA", choices=["none", "all", "lora_only"], unavailable=NO_BIASES,
    )  # fmt: skip
    lora_dtype: str | None = field(
        None,
        "dtype of LoRA weights",
        choices=["float16", "bfloat16", "float32"],
        unavailable={
            "MegatronSftArguments": "adapters have the dtype of the model; the optimizer holds them in fp32",
            "SftArguments": "adapters are trained in fp32 and run in the dtype of the model",
        },
    )
    use_rslora: bool = field(False, "scale by alpha / sqrt(rank)")
    use_dora: bool = field(
        False, "train the length of each row of W + B A by itself (DoRA)", unavailable=ONLY_TRANSFORMERS
    )
    init_weights: str = field(
        "true", "how LoRA begins: true (A random, B zero), gaussian, orthogonal, pissa, pissa_niter_N, olora",
        aliases=["init_lora_weights"], unavailable={"MegatronSftArguments": "LoRA begins with A random and B zero"},
    )  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        self.init_weights = self.init_weights.lower()
        if not re.fullmatch("true|gaussian|orthogonal|olora|pissa(_niter_[1-9][0-9]*)?", self.init_weights):
            raise UsageError(
                f"--init_weights {self.init_weights}: must be true, gaussian, orthogonal, pissa, pissa_niter_N or olora; "
                "other beginnings look at data or quantise weights"
            )
        if self.use_dora and self.init_weights != "true":
            raise UsageError(f"--init_weights {self.init_weights}: goes with plain LoRA; leave out --use_dora")
        if self.tuner_settings and self.train_type not in PEFT_TUNERS:
            raise UsageError(f"--tuner_settings: needs --train_type {', '.join(PEFT_TUNERS)}")
        if self.train_type == "lora_llm":  # text has no gradient in a vision tower, which that would train fully
            self.train_type = "lora"
        for name in ("target_regex", "freeze_parameters_regex", "trainable_parameters_regex"):
            try:
                re.compile(getattr(self, name) or "")
            except re.error as error:
                text = getattr(self, name)
                raise UsageError(f"--{name} {text}: is not a regular expression ({error})") from None
        for name in ("target_modules", "modules_to_save"):
            words = [word for item in getattr(self, name) for word in item.split(",") if word]
            setattr(self, name, list(dict.fromkeys(n for word in words for n in MODULES_CALLED.get(word, (word,)))))

    @property
    def adapts(self) -> bool:
        """Are adapters trained, and written?"""
        return self.train_type not in ("full", "freeze")

    @property
    def begins_with_weights(self) -> bool:
        """Does LoRA begin as a part of the weights?"""
        return self.train_type == "lora" and self.init_weights.startswith(("pissa", "olora"))


@arguments
class GenerationArguments(Arguments):
    """Generation: how answers are made"""

    max_new_tokens: int | None = field(
        None, "longest answer in tokens (default: what the model's length leaves)", common=True, least=1
    )
    temperature: float | None = field(
        None, "0 takes the most likely token (default: the model's own)", common=True, least=0
    )
    top_p: float | None = field(None, "sample among the likeliest tokens that make up this share", least=0, most=1)
    top_k: int | None = field(None, "sample among the k most likely tokens, 0: all", least=0)
    repetition_penalty: float | None = field(None, "above 1: repeats become less likely")
    num_beams: int = field(1, "beams of beam search", least=1)
    stop_words: list[str] = field([], "text that ends an answer")
    stream: bool | None = field(
        None, "show the answer while it is made (default: in the chat, not for a dataset)", common=True
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.repetition_penalty is not None and self.repetition_penalty <= 0:
            raise UsageError(f"--repetition_penalty {self.repetition_penalty}: must be above 0")


PLUGINS = "Python files that register models, templates, datasets, losses, optimizers, callbacks (examples/plugins)"


@arguments
class BaseArguments(RunArguments, DataArguments, TemplateArguments, ModelArguments):
    """General"""

    NOTES: ClassVar[Mapping[str, Note]] = COMMON_NOTES

    custom_register_path: list[str] = field([], PLUGINS, aliases=["external_plugins"], path=True)
    exist_ok: bool = run_setting(False, "write although the output directory exists")
    debug: bool = run_setting(False, "show the traceback of an error", common=True)
    save_config: str | None = run_setting(
        None, "also write what was given to this YAML or JSON file, which the same command takes in place of flags",
        path=True,
    )  # fmt: skip

    def save(self, directory: str | os.PathLike[str]) -> Path:
        """Write `directory`/args.json: every setting as it stands, and the model's facts once they are resolved.

        Access tokens are written as null, those in addresses as ***, values that JSON does not know as their text.
        Returns: the file.
        """
        from pathlib import Path  # what shows help starts without these

        from swiftlite.families.hf_config import text_config
        from swiftlite.utils.io import write_json

        values = {**without_secrets(self.to_dict()), **dict.fromkeys(SETTINGS & {*specs(type(self))})}
        info = getattr(self, "model_info", None)
        if info is not None:
            values.update(model_dir=info.model_dir, max_model_len=info.max_model_len, is_moe_model=info.is_moe_model)
            values["vocab_size"] = text_config(info.config or {}).get("vocab_size")
        values.update(swiftlite_version=__version__, given=sorted(self.given - {"save_config"}))
        path = Path(directory) / "args.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, values, default=str)
        return path
