"""The model and the template of resolved arguments: what needs transformers or a tokenizer."""

from __future__ import annotations

from typing import TYPE_CHECKING

from swiftlite.arguments.base import BaseArguments
from swiftlite.arguments.train import SftArguments
from swiftlite.checkpoint.info import first_of, with_changes
from swiftlite.checkpoint.new_tokens import read_special_tokens, resized_vocab_size
from swiftlite.checkpoint.resolve import resolve
from swiftlite.checkpoint.vocabulary import NewTokens, rows_of
from swiftlite.llm.model.loader import Loaded, backbone_class, get_model_tokenizer, id_of, load_tokenizer
from swiftlite.utils.errors import UsageError
from swiftlite.utils.logger import get_logger
from swiftlite.utils.types import Config, Json

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from swiftlite.llm.template.base import Template


def prepare_template(args: BaseArguments) -> Template:
    """The template with its tokenizer, without a model. Resolves `args` if that has not happened."""
    from swiftlite.families.templates import JINJA
    from swiftlite.llm.dataset.rows import settle_labels
    from swiftlite.llm.template.parity import check_parity
    from swiftlite.llm.template.register import get_template

    if not hasattr(args, "model_info"):
        resolve(args, download_model=False)
    settle_labels(args)  # before a run is held against what its directory records
    _, tokenizer = _load(args, load_model=False)
    if args.template is None:
        if args.use_chat_template and not tokenizer.chat_template:
            raise UsageError(
                f"{args.model_info.model_dir}: it has no chat template and none is known for it; name one with --template"
            )
        args.template = JINJA
    options = {
        **args.get_template_kwargs(),
        "template_backend": args.template_backend,
        "enable_thinking": args.enable_thinking,
        "add_non_thinking_prefix": args.add_non_thinking_prefix,
        "pooled": args.pools,
    }
    template = get_template(args.template, tokenizer, **options)
    args.template_backend = template.template_backend  # what `auto` has come to
    check_parity(template, args.strict_template)
    return template


def load_model(args: BaseArguments) -> PreTrainedModel:
    """The Hugging Face model of resolved `args`, its vocabulary grown for --new_special_tokens."""
    from swiftlite.llm.model.heads import prepare_head

    model, tokenizer = _load(args, load_model=True)
    if args.has_head:
        prepare_head(model, tokenizer, args)
    if args.task_type == "embedding":
        said = {"architectures": [type(model).__name__]}
        args.model_info.config = with_changes(args.model_info.config, said)
    return model


def read_model(args: BaseArguments, directory: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Another model than the one in training, and its tokenizer."""
    model, tokenizer = get_model_tokenizer(
        directory, args.model_info.torch_dtype, args.device_map, use_hf=args.use_hf, need_template=False,
        attn_impl=args.hf_attn_implementation, trust_remote_code=args.trust_remote_code, hub_token=args.hub_token,
        ignore_requirements=args.ignore_requirements, new_special_tokens=args.new_special_tokens,
    )  # fmt: skip
    return model, tokenizer


def prepare_model_template(args: BaseArguments) -> tuple[PreTrainedModel, Template]:
    """(Hugging Face model, template with its tokenizer); the template is right before weights are read."""
    if not hasattr(args, "model_info"):
        resolve(args)
    template = prepare_template(args)
    return load_model(args), template


def plan_tokens(args: BaseArguments, config: Config) -> NewTokens | None:
    """Hold --new_special_tokens against the model's tokenizer; None if there are none.

    Rows are added only where the vocabulary has no room. Raises: UsageError for FP8 weights that would have to grow.
    """
    tokens = read_special_tokens(args.new_special_tokens)
    if not tokens:
        return None
    tokenizer = load_tokenizer(str(args.model_info.model_dir), trust_remote_code=args.trust_remote_code)
    old = rows_of(config)
    if old is None:
        raise UsageError("--new_special_tokens: config.json does not say vocab_size; add it there")
    known = set(tokenizer.get_vocab())
    tokenizer.add_tokens(tokens, special_tokens=True)
    ids = {token: id_of(tokenizer, token) for token in tokens}
    added = [number for token, number in ids.items() if token not in known]
    new = resized_vocab_size(old, len(tokenizer))
    get_logger().info(
        "%d new tokens; vocabulary of %d rows%s", len(added), old, f" grows to {new}" if new > old else " has room"
    )
    if new > old and first_of(config, "quantization_config"):
        raise UsageError(
            "--new_special_tokens: not with FP8 weights; convert without it, then add tokens to the result"
        )
    return NewTokens(ids, new, added)


def _load(args: BaseArguments, load_model: bool) -> Loaded:
    return get_model_tokenizer(
        args.model_info.model_dir,
        args.model_info.torch_dtype,
        args.device_map,
        load_model=load_model,
        model_type=args.model_type,
        new_special_tokens=args.new_special_tokens,
        attn_impl=args.hf_attn_implementation,
        trust_remote_code=args.trust_remote_code,
        need_template=False,
        ignore_requirements=args.ignore_requirements,
        allow_overflow=args.allow_overflow,
        **(_keywords(args) if load_model else {}),
    )


def _keywords(args: BaseArguments) -> Json:
    """Of get_model_tokenizer, for weights that are quantised while they are loaded and for models with a head."""
    from swiftlite.llm.model.heads import classifier_class, head_keywords

    if args.task_type == "embedding":
        return {"model_kwargs": _quantised(args), "automodel_class": backbone_class()}
    if not args.has_head:
        return {"model_kwargs": _quantised(args)}
    made = classifier_class(args.model_info.config)
    return {"model_kwargs": {**_quantised(args), **head_keywords(args)}, "automodel_class": made}


def _quantised(args: BaseArguments) -> Json:
    """Keywords of from_pretrained that --quant_bits asks for."""
    if not isinstance(args, SftArguments) or args.quant_method is None:
        return {}
    from transformers import BitsAndBytesConfig

    if args.model_info.quant_method:
        raise UsageError(
            f"--quant_bits {args.quant_bits}: the checkpoint is quantised already ({args.model_info.quant_method})"
        )
    four = {
        "load_in_4bit": True,
        "bnb_4bit_compute_dtype": args.bnb_4bit_compute_dtype or args.model_info.torch_dtype,
        "bnb_4bit_quant_type": args.bnb_4bit_quant_type,
        "bnb_4bit_use_double_quant": args.bnb_4bit_use_double_quant,
        "bnb_4bit_quant_storage": args.bnb_4bit_quant_storage or "uint8",
    }
    return {"quantization_config": BitsAndBytesConfig(**(four if args.quant_bits == 4 else {"load_in_8bit": True}))}
