"""What is known about models before any of them is opened: dataclasses only, no behaviour beyond lookups.

A Family is an architecture: its config rules, weight map and odd blocks. A ModelMeta is a type of checkpoints of one
architecture, which share a chat template; a Release is one of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from swiftlite.weights.rule import WeightMap

Config = Mapping[str, Any]


@dataclass(frozen=True)
class ConfigRule:
    """`field` of MegatronArguments comes from the first of `hf` that is present and not None, through `to_mcore`.

    Where no key is present the field stays absent (its default applies) unless `default` is given.
    small: the largest value of these keys in a model that is shrunken to try the architecture; None: any.
    """

    field: str
    hf: tuple[str, ...]
    to_mcore: Callable[[Any], Any] | None = None
    default: Any = None
    small: int | None = None

    @property
    def limits(self) -> dict[str, int]:
        return {} if self.small is None else dict.fromkeys(self.hf, self.small)


@dataclass(frozen=True)
class Derived:
    """`field` is computed from the whole HF config; a result of None leaves it absent.

    small: key of the HF config that it reads -> as in ConfigRule.
    """

    field: str
    compute: Callable[[Config], Any]
    small: Mapping[str, int] | None = None

    @property
    def limits(self) -> Mapping[str, int]:
        return self.small or {}


@dataclass(frozen=True)
class Refuse:
    """A config that megatron-core cannot compute, where `when(config)` holds. reason: a format string over its keys."""

    when: Callable[[Config], Any]
    reason: str


Rules = tuple[ConfigRule | Derived | Refuse, ...]


@dataclass(frozen=True)
class Release:
    """One published checkpoint: its id on either hub, and files of its repository that nobody needs (shell patterns)."""

    ms_id: str
    hf_id: str | None = None
    ignore_patterns: tuple[str, ...] = ()

    @property
    def ids(self) -> tuple[str, str]:
        """On ModelScope and on Hugging Face."""
        return self.ms_id, self.hf_id or self.ms_id


@dataclass(frozen=True)
class ModelMeta:
    """A model type: which checkpoints it covers, how they are loaded, which chat template they use.

    get_function: `package.module:function` that loads model and tokenizer, resolved in llm/.
    clues: config.json key (and `rope_type`, None where rope is not scaled) -> values of the released checkpoints, which
        tell types of one architecture apart where neither name nor chat template does.
    named: later releases of an architecture, which a model is only taken for if its name or these values say so.
    """

    model_type: str
    releases: tuple[Release, ...] = ()
    template: str | None = None
    architectures: tuple[str, ...] = ()
    requires: tuple[str, ...] = ()
    ignore_patterns: tuple[str, ...] = ()
    torch_dtype: str | None = None
    task_type: str | None = None
    get_function: str = "swiftlite.llm.model.loader:get_model_tokenizer_with_flash_attn"
    clues: Mapping[str, tuple[object, ...]] | None = None
    named: bool = False


Part = (
    Any  # of a template: text with {{SYSTEM}}, {{QUERY}}, {{DATE}} holes, or a list of one tokenizer attribute's name
)


@dataclass(frozen=True)
class TemplateMeta:
    """Text around a conversation: prefix, then per round prompt + response, chat_sep between, suffix at the end.

    jinja: the file of llm/template/registered that writes a conversation where the parts above cannot say it, and
        parameters: names that are set in it.
    """

    template_type: str
    prefix: tuple[Part, ...]
    prompt: tuple[Part, ...]
    chat_sep: tuple[Part, ...] | None
    suffix: tuple[Part, ...] = (["eos_token_id"],)
    template_cls: str = "Template"
    system_prefix: tuple[Part, ...] | None = None
    default_system: str | None = None
    response_prefix: str = ""
    auto_add_bos: bool = False
    stop_words: tuple[Part, ...] = ()
    agent_template: str = "react_en"
    jinja: str = ""
    parameters: tuple[tuple[str, Any], ...] = ()

    def describe(self) -> dict[str, Any]:
        """What the text consists of, as plain values (lists, not tuples), for logs, args.json and comparison."""
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("jinja", "parameters")}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


@dataclass(frozen=True)
class Family:
    """Everything swiftlite knows about models that share one architecture: one data file under families/.

    architectures: class names that config.json may carry.
    config: rules in the order in which the converted config lists its fields.
    weights: the declarative weight map.
    patches: rules applied after `config` (what an architecture forces).
    blocks: modules under megatron/model/blocks/ that supply unusual layers.
    mtp_key: key of config.json with the number of MTP blocks, where the weight map has them; mtp_default: without it.
    aliases: model_type in config.json that transformers does not know -> the one it knows the same model under.
    wrappers: classes of which this model is the text part -> model_type of their `text_config`; of config.json itself
        where the text part's keys stand at its top.
    part_defaults: keys that such a `text_config` may leave out -> what transformers assumes.
    """

    name: str
    architectures: tuple[str, ...]
    config: Rules
    weights: WeightMap
    patches: Rules = ()
    blocks: tuple[str, ...] = ()
    mtp_key: str = "num_nextn_predict_layers"
    mtp_default: int = 0
    aliases: Mapping[str, str] = field(default_factory=dict)
    wrappers: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    part_defaults: Mapping[str, object] = field(default_factory=dict)
    models: tuple[ModelMeta, ...] = ()
    templates: tuple[TemplateMeta, ...] = ()

    def num_mtp(self, config: Config) -> int:
        """How many MTP blocks config.json announces."""
        return int(config.get(self.mtp_key, self.mtp_default) or 0) if self.weights.mtp_layer else 0

    def limits(self) -> dict[str, int]:
        """config.json key -> its largest value in a shrunken model."""
        rules = [rule for rule in (*self.config, *self.patches) if not isinstance(rule, Refuse)]
        return {self.mtp_key: 1} | {key: limit for rule in rules for key, limit in rule.limits.items()}
