"""Dataclasses as command-line flags and config files: declaration, conversion, aliases, help.

`@arguments` declares a set of arguments, `field(...)` one of them. `parse(cls, argv)` reads
`[config.yaml|config.json] [--flag value ...]`: the file first, then the flags. Imports nothing heavy.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
import types
import typing
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass
from typing import Any, TypeVar

from swiftlite.arguments.config_file import read_config_file
from swiftlite.utils.errors import UsageError
from swiftlite.utils.logger import get_logger
from swiftlite.utils.text import nearest
from swiftlite.utils.types import Json

T = TypeVar("T")
Reader = TypeVar("Reader", bound=Callable[..., object])
REGISTERED: set[str] = set()  # names that plugins have registered so far, for fields with `plugins`


@dataclass(frozen=True)
class Note:
    """What a command says about a flag that does not act there.

    kind: "default" (swiftlite does this anyway: accepted, logged), "rejected", or "default only" (a field of which no
        other value than the default, or false or those allowed, is possible so far).
    allowed: for "default", the values that mean what swiftlite does; another value is an error. None: any value.
    """

    kind: str
    reason: str
    allowed: tuple[str, ...] | None = None


# Name of an arguments class -> what it and its subclasses say about a flag; None: the flag acts there.
Notes = Mapping[str, "Note | str | None"]


def field(
    default: object = MISSING,
    help: str = "",
    *,
    aliases: Iterable[str] = (),
    choices: Iterable[str] | None = None,
    elsewhere: Mapping[str, str] | None = None,
    plugins: bool = False,
    least: float | None = None,
    most: float | None = None,
    path: bool = False,
    common: bool = False,
    resume: str = "must match",
    unavailable: Note | str | Notes | None = None,
) -> Any:
    """The one record of a setting. A list or dict default is copied for each object.

    Args:
        aliases: other names that users type for the same thing; they work as flags, keys, keywords and attributes.
        choices: the allowed strings (None is allowed too where it is the default).
        elsewhere: strings that other tools allow -> what to use instead.
        plugins: other strings are allowed beside files of --external_plugins, which may register them.
        least, most: limits of a number; they are allowed themselves.
        path: values may be paths; a leading ~ is the home directory, also where no shell has read the value.
        common: `--help` shows it; the others need `--help all` or `--help WORD`.
        resume: "may change" or "must match" between the runs that write one output directory.
        unavailable: why only the default is possible (a text), or another note; for some commands by class name.
    """
    metadata = {
        "help": help, "aliases": tuple(aliases), "choices": None if choices is None else tuple(choices), "path": path,
        "elsewhere": elsewhere, "plugins": plugins,
        "least": least, "most": most, "common": common, "resume": resume, "unavailable": unavailable,
    }  # fmt: skip
    if isinstance(default, list | dict):
        return dataclasses.field(default_factory=functools.partial(type(default), default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def run_setting(default: object, help: str, **record: Any) -> Any:
    """A field that says how a run goes, what it logs and saves, not what it computes: it may change on resumption."""
    return field(default, help, resume="may change", **record)


def _once(read: Reader) -> Reader:
    """Keep what is read from a class."""
    return functools.cache(read)  # type: ignore[return-value]


@typing.dataclass_transform(eq_default=False, kw_only_default=True, field_specifiers=(field, run_setting))
def arguments(cls: type[T]) -> type[T]:
    """`dataclass` with keywords only, of which aliases are some.

    dataclass would write and compile __init__ and __repr__ of each class: half of what `--help` takes.
    """
    cls = dataclass(eq=False, repr=False, init=False)(cls)
    cls.__init__ = _init  # type: ignore[method-assign]
    return cls


def _init(self: Any, **given: object) -> None:
    """Raises: TypeError for an unknown keyword, UsageError for a wrong value."""
    given = canonical_names(type(self), given)
    self.__dict__.setdefault("_given", frozenset(given))
    for f in dataclasses.fields(self):
        if f.name in given:
            value = given.pop(f.name)
        else:
            value = f.default if f.default_factory is MISSING else f.default_factory()
        setattr(self, f.name, value)
    if given:
        raise TypeError(f"{type(self).__name__}() got an unexpected keyword argument '{next(iter(given))}'")
    self.__post_init__()


@arguments
class Arguments:
    """Root of all arguments: value checks, alias attributes, plain-data form.

    Class attributes that a subclass may set:
        NOTES: flags of other tools that are not a field here, and groups of fields that do not act, name -> note.
        ADVANCED: set on a part whose flags --help lists last.
        RESUME: set on a part all of whose fields have the same `resume`.
        POSITIONAL: list field that leading words fill, in place of a config file.
        LATER: fields that `--help` of this command does not show first, although they are `common`.
        REST: list field that the words behind a lone `--` fill.
    """

    NOTES: typing.ClassVar[Mapping[str, Note]] = {}
    POSITIONAL: typing.ClassVar[str | None] = None
    LATER: typing.ClassVar[Collection[str]] = ()
    REST: typing.ClassVar[str | None] = None

    def __post_init__(self) -> None:
        """Convert and check each value by its declared type and choices. Subclasses call super() first."""
        said = notes(type(self))
        for spec in specs(type(self)).values():
            value = spec.convert(getattr(self, spec.name), bool(getattr(self, "custom_register_path", None)))
            setattr(self, spec.name, value)
            note = said.get(spec.name)
            allowed = (False, None) if note is None or note.allowed is None else note.allowed
            if note is not None and note.kind == "default only" and value not in (spec.default, *allowed):
                raise UsageError(f"--{spec.name} {show_value(value)}: {note.reason}")

    def __getattr__(self, name: str) -> Any:
        canonical = None if name.startswith("_") else alias_table(type(self)).get(name)
        if canonical is None or canonical == name:
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")
        return getattr(self, canonical)

    @property
    def given(self) -> frozenset[str]:
        """Names of the fields that were set: by file, flags or keyword."""
        given: frozenset[str] = self.__dict__.get("_given", frozenset())
        return given

    @property
    def directory_kinds(self) -> dict[str, tuple[str, ...]]:
        """Field -> what its directory must be, see swiftlite.utils.directories.expect."""
        return {}

    @property
    def needs_megatron(self) -> bool:
        """Does the command import megatron-core?"""
        return False

    @property
    def trains(self) -> bool:
        """Does the command make training samples? Others ask the model, or pass it on."""
        return False

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in self.to_dict().items())})"

    def to_dict(self) -> Json:
        return {spec.name: getattr(self, spec.name) for spec in specs(type(self)).values()}


A = TypeVar("A", bound=Arguments)


@dataclass(frozen=True)
class Spec:
    """One field as the command line sees it: `field`'s record, with name, type and the class that declares it."""

    name: str
    type: Any
    default: object
    owner: type
    help: str = ""
    aliases: tuple[str, ...] = ()
    choices: tuple[str, ...] | None = None
    least: float | None = None
    most: float | None = None
    path: bool = False
    elsewhere: Mapping[str, str] | None = None
    plugins: bool = False
    common: bool = False
    resume: str = "must match"
    unavailable: Note | str | Notes | None = None

    def note(self, cls: type) -> Note | None:
        """What the command of these arguments says about the field; None where it acts."""
        note = self.unavailable
        if isinstance(note, Mapping):
            note = next((note[base.__name__] for base in cls.__mro__ if base.__name__ in note), None)
        return Note("default only", note) if isinstance(note, str) else note

    def convert(self, value: object, with_plugins: bool = False) -> object:
        if self.choices is None or value not in self.choices or typing.get_origin(self.type) is list:
            value = convert(value, self.type, self.name)  # a choice `none` is that, not the absence of one
        beyond = isinstance(value, int | float) and not (self.least or 0) <= value <= (self.most or math.inf)
        if self.least is not None and beyond:
            limit = f"at least {self.least}" if self.least else "0 or more"
            if self.most:
                limit = f"between {self.least} and {self.most}"
            raise UsageError(f"--{self.name} {value}: must be {limit}")
        if self.path and value:
            value = [_home(item) for item in value] if isinstance(value, list) else _home(value)
        if self.choices is not None and value is not None and not (self.plugins and with_plugins):
            for item in value if isinstance(value, list) else [value]:
                if item not in self.choices and not (self.plugins and item in REGISTERED):
                    said = (self.elsewhere or {}).get(str(item), f"must be one of {', '.join(self.choices)}")
                    raise UsageError(f"--{self.name} {item}: {said}")
        return value


def _home(value: object) -> object:
    return os.path.expanduser(value) if isinstance(value, str) and value.startswith("~") else value


@_once
def specs(cls: type) -> dict[str, Spec]:
    """Fields of an arguments class by name, in declaration order."""
    hints = typing.get_type_hints(cls)
    result = {}
    for f in dataclasses.fields(cls):
        owner = next(base for base in reversed(cls.__mro__) if f.name in base.__dict__.get("__annotations__", {}))
        default = f.default if f.default_factory is MISSING else f.default_factory()
        resume = owner.__dict__.get("RESUME", f.metadata["resume"])
        result[f.name] = Spec(f.name, hints[f.name], default, owner, **{**f.metadata, "resume": resume})
    return result


@_once
def alias_table(cls: type) -> dict[str, str]:
    """Every name that may be typed -> field name."""
    table = {name: name for name in specs(cls)}
    for spec in specs(cls).values():
        for alias in spec.aliases:
            if table.setdefault(alias, spec.name) != spec.name:
                raise AssertionError(f"{cls.__name__}: {alias} names both {table[alias]} and {spec.name}")
    return table


@_once
def notes(cls: type[Arguments]) -> dict[str, Note]:
    """Fields of a command and flags of other tools that do not simply act -> what it says about them."""
    found = {spec.name: note for spec in specs(cls).values() if (note := spec.note(cls)) is not None}
    for base in reversed(cls.__mro__):
        for name, note in base.__dict__.get("NOTES", {}).items():
            if name not in alias_table(cls) or name in alias_table(base):  # not where a subclass has made it a field
                found[name] = note
    return found


def canonical_names(cls: type, values: Mapping[str, object], spell: Callable[[str], str] = str) -> Json:
    """Replace aliases by field names; names that are unknown stay (the constructor or the parser refuses them).

    Raises: UsageError if two names of one field carry different values.
    """
    table = alias_table(cls)
    result: Json = {}
    typed: dict[str, str] = {}
    for name, value in values.items():
        target = table.get(name, name)
        if target in result and result[target] != value:
            raise UsageError(
                f"{spell(typed[target])} and {spell(name)} are two names of one setting but differ "
                f"({result[target]} and {value}): give one of them"
            )
        result[target], typed[target] = value, name
    return result


def convert(value: object, hint: Any, name: str) -> Any:
    """Turn text or plain data into `hint`: bool, int, float, str, list[...], dict, and unions with None.

    Raises: UsageError naming the flag, the value and what is allowed.
    """
    if hint is object:
        return value
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        optional = type(None) in inner
        if optional and (value is None or (isinstance(value, str) and value.lower() in ("none", "null"))):
            return None
        options = [option for option in inner if option is not type(None)]
        for option in options[:-1]:
            try:
                return convert(value, option, name)
            except UsageError:
                continue
        return convert(value, options[-1], name)
    if origin is list:
        items = list(value) if isinstance(value, list | tuple) else [value]
        return [convert(item, inner[0] if inner else str, name) for item in items]
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if origin is dict or hint is dict:
        return _to_dict(value, name)
    return _to_scalar(value, hint, name)


def _to_dict(value: object, name: str) -> Json:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise UsageError(f"--{name} {value}: not JSON ({error}); write it like '{{\"key\": 1}}'") from None
    if not isinstance(value, dict):
        raise UsageError(f"--{name} {value}: must be a JSON object, like '{{\"key\": 1}}'")
    return value


def _to_scalar(value: object, hint: Any, name: str) -> Any:
    kinds = {bool: "true or false", int: "a whole number", float: "a number", str: "one value"}
    wrong = UsageError(f"--{name} {value if not isinstance(value, list) else ' '.join(map(str, value))}: "
                       f"must be {kinds.get(hint, hint)}")  # fmt: skip
    if hint is bool:
        if isinstance(value, bool):
            return value
        text = str(value).lower()
        if text in ("true", "1", "yes", "on"):
            return True
        if text in ("false", "0", "no", "off"):
            return False
        raise wrong
    if isinstance(value, list | dict) or value is None or (isinstance(value, bool) and hint is not str):
        raise wrong
    if hint is float and isinstance(value, int | float):
        return value  # 0 stays 0: how a number is spelled is visible in the Megatron-LM arguments
    try:
        if hint is int and isinstance(value, float) and value != int(value):
            raise wrong
        return hint(value)
    except (TypeError, ValueError):
        raise wrong from None


def split_argv(argv: Sequence[str]) -> tuple[list[str], dict[str, list[list[str]]]]:
    """Split into leading positional words and `{flag: values each time}`. `--a-b`, `--a_b` and `--a=x` are read alike.

    A value that itself begins with `--` is written `--flag=--value`.
    """
    positional: list[str] = []
    flags: dict[str, list[list[str]]] = {}
    current: list[str] | None = None
    for word in argv:
        if word.startswith("--") and len(word) > 2:
            name, equals, value = word[2:].partition("=")
            current = [value] if equals else []
            flags.setdefault(name.replace("-", "_"), []).append(current)
        elif current is None:
            positional.append(word)
        else:
            current.append(word)
    return positional, flags


def parse(cls: type[A], argv: Sequence[str]) -> A:
    """Make an arguments object from `[config file] [--flag value ...]`; flags override the file.

    Raises: UsageError for an unknown flag (naming the nearest), a wrong value, or a flag that is refused.
    """
    at = list(argv).index("--") if cls.REST is not None and "--" in argv else len(argv)
    positional, flags = split_argv(argv[:at])
    if "config" in flags and "config" not in alias_table(cls):
        positional += [word for words in flags.pop("config") for word in words]
    if cls.POSITIONAL is None and len(positional) > 1:
        raise UsageError(f"{positional[1]}: unexpected word; a command takes one config file, then --flag value pairs")
    values: Json = {}
    if positional and cls.POSITIONAL is not None:
        values[cls.POSITIONAL] = positional
    elif positional:
        values.update(_accept(cls, read_config_file(positional[0]), where=f"{positional[0]}: "))
    values.update(_accept(cls, {name: _flag_value(cls, name, times) for name, times in flags.items()}))
    if cls.REST is not None and argv[at + 1 :]:
        values[cls.REST] = list(argv[at + 1 :])
    return from_dict(cls, values)


def given_values(args: Arguments, without: Collection[str] = ()) -> Json:
    """What was given to a command, as plain data."""
    return {name: getattr(args, name) for name in specs(type(args)) if name in args.given and name not in without}


def as_words(args: Arguments, without: Collection[str] = ()) -> list[str]:
    """What was given to a command, as words to be typed again."""
    words = []
    for name, value in given_values(args, without).items():
        values = value if isinstance(value, list) else [value]
        texts = [str(v).lower() if isinstance(v, bool) else json.dumps(v) if isinstance(v, dict) else str(v)
                 for v in values]  # fmt: skip
        words += [f"--{name}", *texts]
    return words


def from_dict(cls: type[A], values: Mapping[str, object]) -> A:
    """Make an arguments object from plain data (field names or aliases). Raises: UsageError as `parse`."""
    return cls(**_accept(cls, values))


def _flag_value(cls: type[Arguments], name: str, times: list[list[str]]) -> str | list[str]:
    """The value of a flag; given several times, a list is joined, and of other values the last one counts."""
    spec = specs(cls).get(alias_table(cls).get(name, name))
    words = times[-1]
    if spec is not None and _is_list(spec.type):
        words = [word for part in times for word in part]
    elif any(part != words for part in times):
        get_logger().warning(f"--{name}: given {len(times)} times; the last one counts: {' '.join(words)}")
    if words:
        return words if len(words) > 1 or (spec is not None and _is_list(spec.type)) else words[0]
    if spec is None or spec.type is bool or bool in typing.get_args(spec.type):
        return "true"
    if _is_list(spec.type):
        return []
    raise UsageError(f"--{name}: a value is missing")


def _is_list(hint: Any) -> bool:
    return typing.get_origin(hint) is list or any(typing.get_origin(option) is list for option in typing.get_args(hint))


def _accept(cls: type[Arguments], values: Mapping[str, object], where: str = "") -> Json:
    """Canonical names of what was given, without the names that are accepted but have no field."""
    spell: Callable[[str], str] = (lambda name: name) if where else (lambda name: f"--{name}")
    table, said = alias_table(cls), notes(cls)
    kept = {}
    for name, value in values.items():
        note = said.get(table.get(name, name))
        if name in table and (note is None or note.kind == "default only"):
            kept[name] = value
            continue
        if note is None:
            for other, asked in values.items():  # the reason of a flag that is known explains more
                wider = said.get(table.get(other, ""))
                if wider is not None and wider.kind != "default":
                    if str(asked).lower() in (str(specs(cls)[table[other]].default).lower(), "false", "none"):
                        continue
                    raise UsageError(f"{where}{spell(other)} {asked}: {wider.reason}")
            known = [spell(n) for n in table if table[n] not in said]
            raise UsageError(f"{where}{spell(name)}: unknown {'setting' if where else 'flag'}"
                             f"{nearest(spell(name), known) or '; see --help'}")  # fmt: skip
        text = " ".join(map(str, value)) if isinstance(value, list) else str(value)
        if note.kind == "rejected":
            raise UsageError(f"{where}{spell(name)}: {note.reason}")
        if note.allowed is not None and text.lower() not in note.allowed:
            raise UsageError(f"{where}{spell(name)} {text}: only {' or '.join(note.allowed)} ({note.reason})")
        get_logger().info(f"{where}{spell(name)}: not needed, {note.reason}")
    return canonical_names(cls, kept, spell)


def show_value(value: object) -> str:
    """A value as it is typed."""
    if isinstance(value, bool):
        return str(value).lower()
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)
