"""Which parameters are trained, and in what precision: all, some (`freeze`), or LoRA adapters through peft."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from swiftlite.arguments.base import PEFT_TUNERS, TunerArguments
from swiftlite.arguments.train import SftArguments
from swiftlite.llm.model.adapters import PEFT_TASKS, begin, lora_size, other_config
from swiftlite.llm.model.names import NO_GRADIENTS, Stored, checkpoint_tensors
from swiftlite.train.flops import ModelFlops
from swiftlite.utils.errors import CheckpointError, ConfigError, UsageError
from swiftlite.utils.io import blame, read_json
from swiftlite.utils.logger import get_logger
from swiftlite.utils.text import one_line
from swiftlite.utils.types import Config
from swiftlite.weights.lora import PEFT_PREFIX, check_beginning, check_stated, initial_a
from swiftlite.weights.safetensors import read_header

if TYPE_CHECKING:
    from peft import PeftConfig
    from transformers import PreTrainedModel

logger = get_logger()

FREEZE_FLAGS = ("freeze_parameters", "freeze_parameters_regex", "freeze_parameters_ratio", "trainable_parameters",
                "trainable_parameters_regex")  # fmt: skip


_HELD = "_swiftlite_held_in_fp32"
ADAPTER = "adapter_model.safetensors"


def trainable_names(sizes: Mapping[str, int], args: TunerArguments) -> set[str]:
    """The parameters that are trained with `--train_type full` or `freeze`; the same on both sides.

    Args: sizes: numbers in each parameter by its name in checkpoints. args: TunerArguments.
    A parameter is frozen if a `--freeze_parameters*` flag says so and no `--trainable_parameters*` flag says otherwise;
    with none of the former, `--trainable_parameters*` alone names what is trained.
    Raises: UsageError if nothing is trained, a prefix or expression fits nothing, or `freeze` comes without saying what.
    """
    given = [flag for flag in FREEZE_FLAGS if getattr(args, flag)]
    if args.train_type == "freeze" and not given:
        raise UsageError(f"--train_type freeze: say what with one of --{', --'.join(FREEZE_FLAGS)}")
    frozen = _named(sizes, args, "freeze_parameters") | _lowest(sizes, args.freeze_parameters_ratio)
    if given and all(flag.startswith("trainable") for flag in given):
        frozen = set(sizes)
    trained = set(sizes) - frozen | _named(sizes, args, "trainable_parameters")
    if not trained:
        raise UsageError(f"--{given[0]}: freezes all parameters; nothing would be trained")
    return trained


def _named(names: Mapping[str, int], args: TunerArguments, flag: str) -> set[str]:
    """What --`flag` names by its beginning, and --`flag`_regex by an expression that fits somewhere in it."""
    found, first = set(), next(iter(names))
    for prefix in getattr(args, flag):
        fits = {name for name in names if name.startswith(prefix)}
        if not fits:
            raise UsageError(f"--{flag} {prefix}: no parameter begins so; the first is {first}")
        found |= fits
    text = getattr(args, f"{flag}_regex")
    if text:
        try:
            fits = {name for name in names if re.search(text, name)}
        except re.error as error:
            raise UsageError(f"--{flag}_regex {text}: is not a regular expression ({error})") from None
        if not fits:
            raise UsageError(f"--{flag}_regex {text}: fits no parameter; names are those of the checkpoint, as {first}")
        found |= fits
    return found


# Parameters that one side or the other keeps in one tensor.
_JOINED = ((r"\.experts\.\d+\.", ".experts."), (r"\.[qkv]_proj\.", ".qkv."), (r"\.(gate|up)_proj\.", ".gate_up."))
_IN_A_LAYER = ("input_layernorm", "self_attn", "post_attention_layernorm")


def _lowest(sizes: Mapping[str, int], ratio: float) -> set[str]:
    """The parameters from the input on that make up at most `ratio` of all numbers, by names alone.

    The order is embedding, layers, final norm, head; in a layer: norm, attention, norm, the rest.
    """
    units: dict[str, list[str]] = {}
    for name in sizes:
        unit = name
        for pattern, joined in _JOINED:
            unit = re.sub(pattern, joined, unit)
        units.setdefault(unit, []).append(name)
    budget = ratio * sum(sizes.values())
    total = 0
    found = set()
    for unit in sorted(units, key=_height):
        total += sum(sizes[name] for name in units[unit])
        if total > budget:
            break
        found.update(units[unit])
    return found


def _height(name: str) -> tuple[int, int, int, str]:
    layer = re.search(r"\.layers\.(\d+)\.([^.]+)", name)
    if layer is None:
        return (0 if "embed" in name else 3 if "lm_head" in name else 2), 0, 0, name
    part = _IN_A_LAYER.index(layer[2]) if layer[2] in _IN_A_LAYER else len(_IN_A_LAYER)
    return 1, int(layer[1]), part, name


def prepare_model(model: PreTrainedModel, args: SftArguments) -> Any:
    """Freeze what is not trained, or add LoRA; trained weights are held in fp32 whatever the model's dtype.

    Half precision cannot hold what an optimizer step adds to a weight. The matrices still run in the model's dtype, by
    autocast, and checkpoints have it too.
    """
    if args.adapts:
        model = lora_model(model, args)
    else:
        packed = next((n for n, weight in model.named_parameters() if weight.dtype in (torch.uint8, torch.int8)), None)
        if packed:
            raise UsageError(
                f"--train_type {args.train_type}: {packed} is quantised and has no gradient; use --train_type lora, or the "
                "unquantised checkpoint"
            )
        freeze(model, args)
    setattr(model, _HELD, {name for name, parameter in model.named_parameters() if _rises(parameter)})
    if not args.fsdp:  # else each layer is as it is sharded
        raise_to_fp32(model)
    return model


def _rises(parameter: nn.Parameter) -> bool:
    return parameter.requires_grad and parameter.dtype in (torch.bfloat16, torch.float16)


def raise_to_fp32(module: nn.Module) -> None:
    """Hold what is trained of a module in fp32."""
    for parameter in module.parameters():
        if _rises(parameter):
            parameter.data = parameter.data.float()


def freeze(model: PreTrainedModel, args: SftArguments) -> None:
    """Let only what `trainable_names` says require gradients. Experts that part company become modules of their own.

    What the model declares as not trainable stays so, and has no name here. Raises: UsageError as trainable_names; also
    for tensors of a checkpoint that are one parameter and cannot be divided.
    """
    owners = trainable_tensors(model)
    trained = trainable_names({name: stored.shape.numel() for name, stored in owners.items()}, args)
    if _parted(owners, trained) and split_experts(model, trainable=True):
        owners = trainable_tensors(model)
    parted = _parted(owners, trained)
    if parted:
        raise UsageError(
            f"--train_type {args.train_type}: {parted[1]} would be trained and {parted[0]} not, but they are one "
            "parameter of this model; freeze or train them together"
        )
    for name, stored in owners.items():
        stored.owner.requires_grad_(name in trained)


def trainable_tensors(model: PreTrainedModel) -> dict[str, Stored]:
    """The tensors of a checkpoint that can be trained, tied ones once: a tied head is the embedding."""
    found: dict[str, Stored] = {}
    whole: set[int] = set()
    tensors = checkpoint_tensors(model)
    for name in sorted(tensors, key=lambda name: name.startswith("lm_head")):
        stored = tensors[name]
        is_alias = id(stored.owner) in whole
        if isinstance(stored.owner, nn.Parameter) and stored.owner.requires_grad and not is_alias:
            found[name] = stored
            if stored.is_whole:
                whole.add(id(stored.owner))
    return found


def _parted(owners: Mapping[str, Stored], trained: set[str]) -> tuple[str, str] | None:
    """(name that is frozen, name that is trained) of one parameter, if there is such a pair."""
    kept = {id(stored.owner): name for name, stored in owners.items() if name not in trained}
    return next(((kept[id(s.owner)], n) for n, s in owners.items() if n in trained and id(s.owner) in kept), None)


def check_settings(args: SftArguments) -> None:
    """Try what the user says of layers and parameters on a model without weights. Raises: UsageError as prepare_model."""
    flags = ("target_regex", "modules_to_save", "tuner_settings") if args.adapts else FREEZE_FLAGS
    names_layers = args.adapts and args.target_modules != ["all-linear"]
    if args.adapters or not (names_layers or any(getattr(args, flag) for flag in flags)):
        return
    from transformers import AutoConfig

    from swiftlite.llm.model.heads import classifier_class
    from swiftlite.llm.model.loader import auto_class, backbone_class

    make = classifier_class if args.has_head else auto_class
    made = backbone_class() if args.task_type == "embedding" else make(args.model_info.config)
    code = args.trust_remote_code
    config = AutoConfig.from_pretrained(args.model_info.model_dir, trust_remote_code=code)
    with torch.device("meta"):
        prepare_model(made.from_config(config, trust_remote_code=code), args)


def without_cache(model: PreTrainedModel) -> None:
    """Have a model keep no keys and values: of no use in training, and they hide where joined samples begin."""
    for config in (model.config, model.config.get_text_config()):
        config.use_cache = False


def frozen(model: PreTrainedModel) -> PreTrainedModel:
    """For answers without gradients."""
    without_cache(model)
    return model.requires_grad_(False).eval()


def held_in_fp32(model: PreTrainedModel) -> set[str]:
    """Names of the parameters whose dtype `prepare_model` raised."""
    return getattr(model, _HELD, set())


# ---- LoRA ----


def lora_targets(linear: set[str], args: TunerArguments) -> set[str] | str:
    """`target_modules` for peft. linear: last parts of the names of the model's linear layers.

    `all-linear` is every projection of attention and feed-forward layers, experts included; no routers, no output layer.
    Raises: UsageError for a name that no linear layer has.
    """
    if args.target_regex:
        return str(args.target_regex)
    targets = set(args.target_modules)
    if "all-linear" in targets:
        targets = (targets - {"all-linear"}) | (linear - NO_PROJECTIONS)
    # A name may be a path's end: self_attn.q_proj.
    unknown = sorted(target for target in targets if target.rpartition(".")[2] not in linear)
    if unknown:
        raise UsageError(f"--target_modules {unknown[0]}: no such linear layer; there are {', '.join(sorted(linear))}")
    return targets


# Linear layers that are not projections of attention or feed-forward layers: output layers and routers.
NO_PROJECTIONS = {"lm_head", "embed_out", "score", "gate", "wg", "router", "shared_expert_gate"}


def linear_layers(model: PreTrainedModel) -> list[str]:
    """Names of the linear layers; of a model that reads images too, those of its text part."""
    whole = model.config.get_text_config() is model.config or not hasattr(model, "get_decoder")
    inside = None if whole else {id(module) for module in model.get_decoder().modules()}
    linear = ((name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear))
    found = [name for name, module in linear if inside is None or id(module) in inside]
    return [name for name in found if NO_GRADIENTS not in name]


def _of_other_parts(model: PreTrainedModel, linear: list[str]) -> list[str]:
    """Linear layers that would get adapters by their last name, though they are not among `linear`."""
    last = {name.rpartition(".")[2] for name in linear}
    others = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)} - set(linear)
    return sorted(name for name in others if name.rpartition(".")[2] in last)


def lora_model(model: PreTrainedModel, args: SftArguments) -> Any:
    """The model with adapters: new, or resumed from `--adapters DIR`. Names are those of the checkpoint's weights."""
    from peft import LoraConfig

    if len(args.adapters) > 1:
        raise UsageError("--adapters: training resumes from one adapter; merge the others with `swiftlite export`")
    if args.adapters:
        return attach_adapter(model, Path(args.adapters[0]), trainable=True)
    split_experts(model)
    linear = linear_layers(model)
    targets = lora_targets({name.rpartition(".")[2] for name in linear}, args)
    head = model.get_output_embeddings()
    tied = head is not None and head.weight is model.get_input_embeddings().weight
    new_rows = getattr(model, "new_token_ids", None)
    ends = ("embed_tokens", *(() if tied or head is None else ("lm_head",)))
    kept = [name for name in ends if name not in args.modules_to_save]
    together = tied and {"embed_tokens", "lm_head"} & {name.rpartition(".")[2] for name in args.modules_to_save}
    if args.train_type != "lora":
        other = other_config(args, sorted(targets) if isinstance(targets, set) else targets, args.modules_to_save)
        # peft makes some of them of values, which a trial has not.
        return model if model.device.type == "meta" else _with_adapters(model, other)
    config = LoraConfig(
        **lora_size(args),
        lora_dropout=args.lora_dropout,
        bias=args.lora_bias,  # type: ignore[arg-type]  # its choices are the field's
        use_rslora=args.use_rslora,
        use_dora=args.use_dora,
        target_modules=sorted(targets) if isinstance(targets, set) else targets,
        exclude_modules=_of_other_parts(model, linear) or None,
        modules_to_save=list(args.modules_to_save) or None,  # peft changes it
        trainable_token_indices={name: new_rows for name in kept} if new_rows and kept and not together else None,
        ensure_weight_tying=bool(together),
        task_type=PEFT_TASKS[args.task_type or "causal_lm"],  # type: ignore[arg-type]  # peft's names as text
    )
    adapted = _with_adapters(model, config)
    if args.init_weights != "true":
        begin(adapted, args)
        return adapted
    for name, parameter in adapted.named_parameters():
        module, part, _ = name.removeprefix(PEFT_PREFIX).partition(".lora_A.")
        if part:  # the same as on Megatron
            rank, into = parameter.shape
            named = f"{model.base_model_prefix}.{module}" if args.task_type == "embedding" else module
            parameter.data.copy_(initial_a(named, rank, into, args.seed))
    return adapted


def attach_adapter(model: PreTrainedModel, directory: Path, trainable: bool = False) -> Any:
    """The model with an adapter from `directory`, one pair per expert or packed as peft writes fused experts.

    peft itself loses the shared experts' adapters of such models under transformers 5.
    Raises: CheckpointError naming what is amiss.
    """
    from peft import PeftConfig

    if not (directory / "adapter_config.json").is_file():
        raise CheckpointError(f"{directory}: holds no adapter_config.json; name the directory of a LoRA adapter")
    path = directory / "adapter_config.json"
    stated = read_json(path)
    check_beginning(stated, path)
    with blame(path):
        if stated.get("peft_type") not in PEFT_TUNERS.values():
            check_stated(stated)
            _check_rank(stated, directory / ADAPTER)
        config = PeftConfig.from_pretrained(str(directory))
        if not _target_parameters(config):
            split_experts(model)
        config.inference_mode = not trainable
        adapted = _with_adapters(model, config)
    load_adapter(adapted, directory)
    return adapted


def _check_rank(stated: Config, weights: Path) -> None:
    """Before matrices of the stated ranks are made. Raises: ConfigError for one that no matrix of the file has."""
    if not weights.is_file():
        return  # which is told where they are read
    most = max((t.spec.shape[0] for n, t in read_header(weights).items() if re.search(r"\.lora_\w*A\b", n)), default=0)
    for key, rank in (("r", stated["r"]), *(stated.get("rank_pattern") or {}).items()):
        if not isinstance(rank, int) or rank > most:
            raise ConfigError(
                f"adapter_config.json: {key} is {rank!r}; no matrix in {weights} has more than {most} rows"
            )


def _target_parameters(config: PeftConfig) -> object:
    return getattr(config, "target_parameters", None)


def _with_adapters(model: PreTrainedModel, config: PeftConfig) -> Any:
    from peft import get_peft_model

    try:
        with nullcontext() if _target_parameters(config) else _no_conversion(model):
            return get_peft_model(model, config)
    except ValueError as error:
        raise UsageError(f"adapters cannot be added: {one_line(error)}") from None


@contextmanager
def _no_conversion(model: PreTrainedModel) -> Iterator[None]:
    """peft rewrites targets of types that transformers 5 fuses experts of; ours are split again, so nothing is to do."""
    config: Any = model.config
    kind = config.model_type
    config.model_type = f"{kind}_split"
    try:
        yield
    finally:
        config.model_type = kind


def load_adapter(model: Any, directory: Path) -> None:
    """Load adapter_model.safetensors into a model that `lora_model` made. Raises: CheckpointError naming what is amiss."""
    from peft import set_peft_model_state_dict
    from safetensors.torch import load_file

    path = directory / ADAPTER
    if not path.is_file():
        raise CheckpointError(f"{directory}: holds no adapter_model.safetensors")
    with nullcontext() if _target_parameters(model.peft_config["default"]) else _no_conversion(model):
        try:
            tensors = load_file(path)
            damaged = next((name for name, tensor in tensors.items() if not tensor.isfinite().all()), None)
            if damaged:
                raise CheckpointError(f"{path}: {damaged} has values that are NaN or infinite; train or copy it again")
            result: Any = set_peft_model_state_dict(model, tensors)
        except RuntimeError as error:  # shapes
            raise CheckpointError(f"{path}: does not fit the model: {one_line(error)}") from None
    parameters = dict(model.named_parameters(remove_duplicate=False))
    # The rows of a tied output layer are those of the embedding, and have its name.
    found = {id(parameter) for name, parameter in parameters.items() if name not in result.missing_keys}
    own = re.compile(rf"\.({model.base_model.prefix}|modules_to_save\.|token_adapter\.trainable_)")
    missing = [n for n in result.missing_keys if own.search(n) and id(parameters.get(n)) not in found]
    if missing or result.unexpected_keys:
        raise CheckpointError(f"{path}: {(missing or result.unexpected_keys)[0]} is missing in the one or the other")


class SplitExperts(nn.ModuleList):
    """Experts as one module each, over the storage of transformers 5's fused weights: names as in the checkpoint.

    Every expert runs, also for no token, so that all adapters have gradients on all ranks.
    """

    def __init__(self, fused: Any) -> None:
        super().__init__(
            _Expert(fused.gate_up_proj[i], fused.down_proj[i], fused.act_fn) for i in range(len(fused.down_proj))
        )

    def forward(self, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """hidden: [T, H]. top_k_index, top_k_weights: [T, K]. Returns: [T, H]."""
        total = torch.zeros_like(hidden)
        for number, expert in enumerate(self):
            token, choice = torch.where(top_k_index == number)
            out = expert(hidden[token]) * top_k_weights[token, choice, None]
            total.index_add_(0, token, out.to(total.dtype))
        return total


class _Expert(nn.Module):
    def __init__(self, gate_up: Tensor, down: Tensor, act_fn: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        gate, up = gate_up.chunk(2)
        self.gate_proj, self.up_proj = _linear(gate), _linear(up)
        self.down_proj = _linear(down)
        self.act_fn = act_fn

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))  # type: ignore[no-any-return]


def _linear(weight: Tensor) -> nn.Linear:
    """A frozen layer without bias over the storage of `weight` [out, in]."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(weight.detach(), requires_grad=False)
    return layer


def _is_divisible(fused: Any) -> bool:
    """Are the experts gate, up and down projections as SplitExperts computes them?"""
    up, down = fused.gate_up_proj, fused.down_proj
    gate = getattr(
        type(fused), "_apply_gate", None
    )  # newer releases of transformers; another than theirs is another MLP
    return (
        {name for name, _ in fused.named_parameters()} == {"gate_up_proj", "down_proj"}
        and (up.shape[1], up.shape[2]) == (2 * down.shape[2], down.shape[1])
        and (gate is None or gate.__name__ == "_default_apply_gate")
    )


def split_experts(model: PreTrainedModel, trainable: bool = False) -> int:
    """Replace fused experts by SplitExperts, in place. Returns: how many layers; 0 with transformers 4, where none are."""
    count = 0
    stored: Mapping[str, Stored] = {}
    for place, module in list(model.named_modules()):
        fused = getattr(module, "experts", None)
        up, down = getattr(fused, "gate_up_proj", None), getattr(fused, "down_proj", None)
        if isinstance(up, nn.Parameter) and isinstance(down, nn.Parameter) and up.dim() == 3:
            stored = stored or checkpoint_tensors(model)
            if not _is_divisible(fused) or f"{place}.experts.0.gate_proj.weight" not in stored:
                logger.warning("%s: experts of this form get no adapters of their own", type(fused).__name__)
                return 0
            module.experts = SplitExperts(fused).requires_grad_(trainable)
            count += 1
    return count


# ---- facts of the trained parameters ----


def trained_weights(model: PreTrainedModel, flops: ModelFlops) -> dict[str, float | None]:
    """`trained` and `adapters` for ModelFlops.training: the matrices' numbers that a token meets."""
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings()
    lookup = embedding if head is None or head.weight is not embedding else None
    adapters = own = 0.0
    frozen = False
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            frozen = True
        elif parameter.dim() >= 2 and parameter is not lookup:
            met = parameter.numel() * (flops.expert_share if ".experts." in name else 1.0)
            if ".lora_" in name:
                adapters += met
            else:
                own += met
    return {"trained": own if frozen else None, "adapters": adapters}
