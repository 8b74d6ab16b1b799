"""Loads Hugging Face models and tokenizers, and fixes what checkpoints commonly leave open.

transformers and torch are imported when something is loaded.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, cast

from swiftlite.arguments.base import ATTENTION
from swiftlite.checkpoint.files import check_side_files
from swiftlite.checkpoint.info import ModelInfo, config_dtype, with_changes
from swiftlite.checkpoint.new_tokens import read_special_tokens, resized_vocab_size
from swiftlite.checkpoint.registry import AUTO_CLASSES, get_model_info_meta
from swiftlite.checkpoint.vocabulary import rows_of
from swiftlite.families.hf_config import classes_of
from swiftlite.families.records import ModelMeta
from swiftlite.llm.model.corrections import correct
from swiftlite.utils.errors import CheckpointError, ConfigError, SwiftliteError, UsageError, reason
from swiftlite.utils.logger import get_logger
from swiftlite.utils.types import Config, Json

if TYPE_CHECKING:
    import torch
    from transformers import AutoModel, PreTrainedModel, PreTrainedTokenizerBase

Loaded: TypeAlias = (
    "tuple[Any, PreTrainedTokenizerBase]"  # (model, None where only the tokenizer is asked for; tokenizer)
)

logger = get_logger()


def resolve_function(path: str) -> Any:
    """The object behind `package.module:name`, the form in which registry records name functions."""
    module, _, name = path.partition(":")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"{path} cannot be imported ({error}); write it as package.module:function") from error


def add_special_tokens(
    tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel | None, tokens: Sequence[str]
) -> list[int]:
    """Add `tokens` to the tokenizer and, where the model has no room for them, rows to its embedding and output.

    Returns: the ids of those that were new.
    """
    known = set(tokenizer.get_vocab())
    tokenizer.add_tokens(list(tokens), special_tokens=True)
    added = [id_of(tokenizer, token) for token in tokens if token not in known]
    if added and model is not None:
        grow_vocabulary(model, resized_vocab_size(vocab_size_of(model), len(tokenizer)))
    return added


def grow_vocabulary(model: PreTrainedModel, rows: int) -> None:
    """Give embedding and output layer `rows` rows, if they have fewer.

    New rows are the mean of the old ones, so that an untrained token is neither favoured nor impossible.
    """
    old = vocab_size_of(model)
    if rows <= old:
        return
    import torch

    logger.info("vocabulary grows from %d to %d rows", old, rows)
    model.resize_token_embeddings(rows, mean_resizing=False)  # and the configs
    modules = (model.get_input_embeddings(), model.get_output_embeddings())
    with torch.no_grad():
        for weight in {
            cast("torch.nn.Embedding", module).weight for module in modules if module
        }:  # one if they are tied
            weight[old:] = weight[:old].float().mean(dim=0).to(weight.dtype)
    model.config.get_text_config().vocab_size = rows


def id_of(tokenizer: PreTrainedTokenizerBase, token: str) -> int:
    return cast("int", tokenizer.convert_tokens_to_ids(token))


def embedding_rows(model: PreTrainedModel) -> int:
    """Rows of the embedding that a model holds."""
    return cast("torch.nn.Embedding", model.get_input_embeddings()).weight.shape[0]


def vocab_size_of(model: PreTrainedModel) -> int:
    """Rows of the vocabulary, also of a model that reads images too, whose text part has a config of its own."""
    return int(model.config.get_text_config().vocab_size)


def repair_pad_eos(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel | None = None) -> None:
    """Let pad and eos stand in for each other where one is missing, and tell the model's configs the pad id.

    Raises: ConfigError where the tokenizer has neither.
    """
    pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    if pad_id is None:
        raise ConfigError(
            f"the tokenizer in {tokenizer.name_or_path} has neither a pad nor an eos token; "
            "add one of them to its tokenizer_config.json"
        )
    token = tokenizer.convert_ids_to_tokens(pad_id)
    if tokenizer.eos_token_id is None:
        logger.info("the tokenizer has no eos token; its pad token %s stands in", token)
        tokenizer.eos_token = token
    if tokenizer.pad_token_id is None:
        logger.info("the tokenizer has no pad token; its eos token %s stands in", token)
        tokenizer.pad_token = token
    if model is None:
        return
    configs: dict[int, Any] = {
        id(m.config): m.config for m in model.modules() if getattr(m, "config", None) is not None
    }
    for config in (*configs.values(), getattr(model, "generation_config", None)):
        if getattr(config, "pad_token_id", pad_id) not in (None, pad_id):
            config.pad_token_id = pad_id


def load_tokenizer(model_dir: str, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """AutoTokenizer of a local directory. Raises CheckpointError where there is none that loads."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(model_dir, trust_remote_code=trust_remote_code)
    except Exception as error:  # transformers releases differ in how missing files fail, down to AttributeError
        check_side_files(Path(model_dir))
        raise CheckpointError(
            f"no tokenizer could be loaded from {model_dir}: {reason(error)}; "
            "it needs tokenizer.json (or the vocabulary files) and tokenizer_config.json"
        ) from error


def _load_model(model_dir: str, model_info: ModelInfo, automodel_class: type | None, **kwargs: Any) -> Any:
    """`from_pretrained`, for files that hold exactly this model. Raises: CheckpointError naming what is amiss."""
    from swiftlite.llm.model.names import Others, check_names, keep_declared_frozen

    dtype = "auto" if model_info.quant_method == "fp8" else model_info.torch_dtype
    model_class: Any = automodel_class or auto_class(model_info.config or {})
    try:
        model, loading = model_class.from_pretrained(
            model_dir, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True, **kwargs
        )
    except Exception as error:  # damaged and hostile files fail in any way there is
        check_side_files(Path(model_dir))
        way = "; or use the unquantised checkpoint" if model_info.quant_method else ""
        raise CheckpointError(f"the model in {model_dir} could not be loaded: {reason(error)}{way}") from error
    others, headless = Others.of(model_info.config or {}), automodel_class is backbone_class()
    unexpected = [
        n for n in loading["unexpected_keys"] if not (others.has(n) or (headless and n.startswith("lm_head.")))
    ]
    for found in sorted(loading["mismatched_keys"]):  # transformers 4 tells names only
        name, *shapes = [found] if isinstance(found, str) else found
        seen = ": {} and {}".format(*map(list, shapes)) if shapes else ""
        raise CheckpointError(
            f"{model_dir}: file and config.json give {name} different shapes{seen}; the two do not belong together"
        )
    missing = loading["missing_keys"]
    if automodel_class is not None and classes_of(model_info.config) is None:  # a new head instead of the old one
        missing = [name for name in missing if name.startswith(f"{model.base_model_prefix}.")]
        unexpected = [name for name in unexpected if not name.startswith("lm_head.")]
    check_names(missing, unexpected, model_dir)
    keep_declared_frozen(model)
    _freeze_other_parts(model)
    return model


def backbone_class() -> type[AutoModel]:
    """The class of transformers that builds a model without its output layer, for embeddings."""
    from transformers import AutoModel

    return AutoModel


def auto_class(config: Config) -> Any:
    """The class of transformers that builds the model of a config.json: of text, of images and text, or a classifier."""
    import transformers
    from transformers.models.auto import modeling_auto

    if classes_of(config) is not None:
        return transformers.AutoModelForSequenceClassification
    kind, (architecture, *_) = config.get("model_type"), config.get("architectures") or [""]
    named = config.get("auto_map") or {}
    text, images = (getattr(modeling_auto, table) for table in AUTO_CLASSES.values())
    whole = images.get(kind)
    reads_images = architecture == whole if kind in text else whole is not None
    if named:
        reads_images = "AutoModelForCausalLM" not in named and (reads_images or "AutoModelForImageTextToText" in named)
    return getattr(transformers, list(AUTO_CLASSES)[reads_images])


def _freeze_other_parts(model: PreTrainedModel) -> None:
    """Train nothing of a model that reads images too but its text part."""
    config = model.config
    if config.get_text_config() is config or not hasattr(model, "get_decoder"):
        return
    kept = {id(p) for part in (model.get_decoder(), model.get_output_embeddings()) if part for p in part.parameters()}
    for parameter in model.parameters():
        if id(parameter) not in kept:
            parameter.requires_grad_(False)
    logger.info("%s: text only; the parts for images are neither used nor trained", type(model).__name__)


def get_model_tokenizer_from_local(
    model_dir: str,
    model_info: ModelInfo,
    model_kwargs: Json | None = None,
    load_model: bool = True,
    *,
    automodel_class: type | None = None,
    trust_remote_code: bool = False,
) -> Loaded:
    """Tokenizer, and with `load_model` the model, of a local directory; pad and eos are repaired on both."""
    tokenizer = load_tokenizer(model_dir, trust_remote_code=trust_remote_code)
    model = None
    if load_model:
        model = correct(
            _load_model(
                model_dir, model_info, automodel_class, trust_remote_code=trust_remote_code, **(model_kwargs or {})
            )
        )
    repair_pad_eos(tokenizer, model)
    return model, tokenizer


def get_model_tokenizer_with_flash_attn(
    model_dir: str,
    model_info: ModelInfo,
    model_kwargs: Json | None = None,
    load_model: bool = True,
    *,
    attn_impl: str | None = None,
    **kwargs: Any,
) -> Loaded:
    """The usual loader: `get_model_tokenizer_from_local` with the attention implementation of `--attn_impl`."""
    model_kwargs = dict(model_kwargs or {})
    if attn_impl is not None:
        implementation = ATTENTION.get(attn_impl, (None, None))[1]
        if implementation is None:
            names = sorted({known for _, known in ATTENTION.values() if known is not None})
            raise UsageError(f"--attn_impl {attn_impl} is not known; allowed: {', '.join(names)}")
        model_kwargs["attn_implementation"] = implementation
    return get_model_tokenizer_from_local(model_dir, model_info, model_kwargs, load_model, **kwargs)


def _check_cast(model: PreTrainedModel, model_info: ModelInfo, allow_overflow: bool) -> None:
    """Raises: CheckpointError naming weights that are infinite since they were cast to another dtype."""
    import torch

    from swiftlite.weights.storage import check_overflow

    config, dtype = model_info.config or {}, model_info.torch_dtype
    if dtype in (torch.float16, torch.bfloat16) and config_dtype(config) != dtype:
        found = (n for n, p in model.named_parameters() if p.dtype == dtype and not p.is_meta and bool(p.isinf().any()))
        check_overflow(found, dtype, allow_overflow)


def _for_quantised(model_info: ModelInfo) -> Json:
    """Keywords of from_pretrained for weights of this kind. Raises: SwiftliteError for a kind that nothing is done with."""
    method = model_info.quant_method
    if method in ("gptq", "awq"):
        raise SwiftliteError(
            f"{model_info.model_dir} holds {method.upper()} weights, which cannot be trained or converted; use the "
            "unquantised checkpoint"
        )
    if method == "mxfp4":  # of gpt-oss: steps and adapters need numbers
        from transformers.utils.quantization_config import Mxfp4Config

        return {"quantization_config": Mxfp4Config(dequantize=True)}
    if method == "compressed-tensors":
        from transformers.utils.quantization_config import CompressedTensorsConfig

        try:
            return {"quantization_config": CompressedTensorsConfig(run_compressed=False)}
        except ImportError as error:
            raise SwiftliteError(f"{model_info.model_dir} has packed weights: {reason(error)}") from None
    return {}


def _type_loader(meta: ModelMeta, attn_impl: str | None, trust_remote_code: bool) -> Callable[..., Loaded]:
    """The function that loads models of a type, with the options that it takes only if they are given."""
    get_function = resolve_function(meta.get_function)
    given: dict[str, object] = {} if attn_impl is None else {"attn_impl": attn_impl}
    if trust_remote_code or "trust_remote_code" in inspect.signature(get_function).parameters:
        given["trust_remote_code"] = trust_remote_code
    return partial(get_function, **given)


def get_model_tokenizer(
    model_id_or_path: str,
    torch_dtype: str | torch.dtype | None = None,
    device_map: object = None,
    *,
    load_model: bool = True,
    use_hf: bool = False,
    model_type: str | None = None,
    revision: str | None = None,
    new_special_tokens: Sequence[str] | None = None,
    attn_impl: str | None = None,
    trust_remote_code: bool = False,
    need_template: bool = True,
    ignore_requirements: bool = False,
    download_model: bool | None = None,
    hub_token: str | None = None,
    model_kwargs: Json | None = None,
    allow_overflow: bool = False,
    **kwargs: Any,
) -> Loaded:
    """Load a model and its tokenizer from a local directory, ModelScope (default hub) or Hugging Face (`use_hf`).

    Args:
        torch_dtype: torch dtype or its name; None takes the checkpoint's.
        device_map: as transformers takes it ("auto", "cuda:0", a dict); None loads on the CPU.
        load_model: False loads the tokenizer only, and downloads no weights unless `download_model`.
        model_type: registered type, where it cannot be told from the files.
        new_special_tokens: tokens to add, or `.txt` files of them; embeddings grow only if the vocabulary has no room.
        attn_impl: eager, sdpa, flash_attn, ...
        trust_remote_code: run Python files that the checkpoint brings along.
        model_kwargs: further keywords of `from_pretrained`.
        allow_overflow: only warn of weights that torch_dtype cannot hold.
        kwargs: further keywords of the type's own loader.
    Returns: `(model or None, tokenizer)`; both carry `model_info` and `model_meta`.
    Raises: SwiftliteError subclasses, one line each.
    """
    model_info, model_meta = get_model_info_meta(
        model_id_or_path,
        torch_dtype=torch_dtype,
        use_hf=use_hf,
        model_type=model_type,
        revision=revision,
        download_model=load_model if download_model is None else download_model,
        need_template=need_template,
        ignore_requirements=ignore_requirements,
        hub_token=hub_token,
    )
    model_kwargs = {**_for_quantised(model_info), **(model_kwargs or {})}
    if device_map is not None:
        model_kwargs["device_map"] = device_map
    get_function = _type_loader(model_meta, attn_impl, trust_remote_code)
    model, tokenizer = get_function(model_info.model_dir, model_info, model_kwargs, load_model, **kwargs)
    if model is not None:
        _check_cast(model, model_info, allow_overflow)
    tokens = read_special_tokens(new_special_tokens)
    tokenizer.new_token_ids = add_special_tokens(tokenizer, model, tokens) if tokens else []
    tokenizer.model_info, tokenizer.model_meta = model_info, model_meta
    if model is not None:
        _describe(model, tokenizer)
    return model, tokenizer


def _describe(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Let a model carry what its tokenizer does, and tell both of the rows of its vocabulary, which may have grown."""
    info: ModelInfo = tokenizer.model_info
    told = {name: getattr(tokenizer, name) for name in ("model_info", "model_meta", "new_token_ids")}
    vars(model).update(told, model_dir=info.model_dir)
    if info.config is not None and vocab_size_of(model) != rows_of(info.config):
        info.config = with_changes(info.config, {"vocab_size": vocab_size_of(model)})


def get_model_processor(model_id_or_path: str, *args: Any, **kwargs: Any) -> Loaded:
    """`get_model_tokenizer` under the name that covers models whose tokenizer is part of a processor."""
    return get_model_tokenizer(model_id_or_path, *args, **kwargs)


__all__ = [
    "ModelMeta",
    "add_special_tokens",
    "grow_vocabulary",
    "get_model_processor",
    "get_model_tokenizer",
    "get_model_tokenizer_from_local",
    "get_model_tokenizer_with_flash_attn",
    "load_tokenizer",
    "read_special_tokens",
    "repair_pad_eos",
    "resized_vocab_size",
]
