"""Weight rules and their binding to one model: names, shapes and row gathers of all tensors, the coverage check."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache

from swiftlite.utils.errors import MapError, ShapeError
from swiftlite.utils.text import listing
from swiftlite.weights.fused import FusedTensor
from swiftlite.weights.ops import COPY, Op, Segment, Shape
from swiftlite.weights.shape import NO_LAYER, LayerKind, ModelShape

Dims = tuple[str | int, ...]


@dataclass(frozen=True)
class Naming:
    """How files name the tensors of a text model that is a part of a larger one: the text model's own names begin with
    `plain`, which stands as `stored` in the files. The head and MTP blocks are beside the model proper.
    """

    plain: str
    stored: str

    def __call__(self, name: str) -> str:
        """The name in the files of one of the text model's own names."""
        return self.stored + name.removeprefix(self.plain) if name.startswith(self.plain) else name

    def is_text(self, name: str) -> bool:
        """Whether a name in the files is a tensor of the text model; what is not is another part's."""
        return name.startswith(tuple(self(part) for part in _TEXT_PARTS))


_TEXT_PARTS = ("model.", "lm_head.", "mtp.")
NAMINGS = (
    Naming("model.", "model.language_model."),  # releases of transformers since 4.52, and modules of the live model
    Naming("", "language_model."),  # files that are older, and those of LLaVA's descendants
    Naming("", ""),  # Qwen2.5-VL on the hubs: the other parts are beside `model`
)


def text_name(name: str) -> str:
    """The text model's own name for what any of NAMINGS, or the text model itself, calls `name`."""
    for naming in NAMINGS[:2]:
        if name.startswith(naming.stored):
            name = naming.plain + name.removeprefix(naming.stored)
            return name.replace("model.blocks.", "model.layers.", 1)  # Kimi-K2.5's, in transformers 5.24
    return name


@dataclass(frozen=True)
class Condition:
    """When a rule applies: `test(model, kind of the layer)`. Outside layers the kind is NO_LAYER."""

    name: str
    test: Callable[[ModelShape, LayerKind], bool]

    def __and__(self, other: Condition) -> Condition:
        return Condition(f"{self.name} and {other.name}", lambda m, kind: self.test(m, kind) and other.test(m, kind))


ALWAYS = Condition("always", lambda m, kind: True)


@dataclass(frozen=True)
class Source:
    """A Hugging Face tensor: its name with {layer} and {expert} holes, its dimensions as names of ModelShape."""

    name: str
    dims: Dims


@dataclass(frozen=True)
class WeightRule:
    """`mcore` is made of the `hf` tensors by `op`.

    mcore: canonical name, which is the Transformer Engine spec's name on disk; {layer} stands for the whole prefix of a
    layer. A rule with {expert} in its sources gives one slice per expert of a tensor with a leading [E].
    keep_dtype: stays as stored, whatever --torch_dtype says (router bias).
    is_buffer: kept in fp32 and moved by no optimizer (router bias).
    carried: no live model holds it; it goes unchanged into every checkpoint.
    """

    mcore: str
    hf: tuple[Source, ...]
    op: Op = COPY
    when: Condition = ALWAYS
    keep_dtype: bool = False
    is_buffer: bool = False
    carried: bool = False

    @property
    def per_expert(self) -> bool:
        return any("{expert}" in s.name for s in self.hf)


@dataclass(frozen=True)
class Duplicate:
    """`name` may exist in a checkpoint as a byte-equal copy of `of` (a stored tied lm_head, MTP's own embedding).

    Megatron holds it once. Presence is recorded in the manifest and the copy is written again on export.
    """

    name: str
    of: str
    when: Condition = ALWAYS


@dataclass(frozen=True)
class Fused:
    """Checkpoints keep the tensors `parts` of all experts in one, `name`: [E, out, in], `transposed` [E, in, out].

    parts: HF names with {expert}, the out of one after that of the other; interleaved: taking turns. The rules are about
    the parts. A checkpoint may hold either, and matrices kept the other way; where nothing says which, it gets this one.
    of_part: where nothing says which, only files of a larger model, whose text part this is, get it.
    """

    name: str
    parts: tuple[str, ...]
    transposed: bool = False
    interleaved: bool = False
    of_part: bool = False


@dataclass(frozen=True)
class WeightMap:
    """All rules of a family.

    top: rules without a layer. layer: rules for each decoder layer, also for the layer inside an MTP block.
    mtp: rules of an MTP block itself, {layer} being the block's prefix. mtp_layer: HF prefix of MTP block {index},
    where {number} counts on after the decoder layers; None = the family has none.
    ignore: patterns of tensors that are derived, never weights. fused: what files may keep joined, in any layer.
    modules: (part of the files' names, what transformers' classes call it), where adapters are concerned.
    live: how these classes call the text part of a larger model.
    """

    top: tuple[WeightRule, ...]
    layer: tuple[WeightRule, ...]
    mtp: tuple[WeightRule, ...] = ()
    mtp_layer: str | None = None
    duplicates: tuple[Duplicate, ...] = ()
    ignore: tuple[str, ...] = ("*.rotary_emb.inv_freq",)
    hf_layer: str = "model.layers.{index}"
    fused: tuple[Fused, ...] = ()
    modules: tuple[tuple[str, str], ...] = ()
    live: Naming = NAMINGS[0]

    def bind(self, model: ModelShape) -> BoundMap:
        """Write the rules out for one model. Raises: MapError if two rules claim one name."""
        return _bind(self, model)

    def _bound(self, model: ModelShape) -> BoundMap:
        entries = list(self._entries(self.top, Layer(), NO_LAYER, model))
        layers = [self.hf_layer.format(index=index) for index in range(model.num_layers)]
        for index, kind in enumerate(model.layer_kinds):
            layer = Layer(self.hf_layer.format(index=index), "decoder.layers", index)
            entries += self._entries(self.layer, layer, kind, model)
        duplicates = [d for d in self.duplicates if d.when.test(model, NO_LAYER) and "{layer}" not in d.name]
        # Without an output layer there are no such blocks, whatever config.json says.
        for index in range(model.num_mtp if self.mtp_layer and model.num_labels is None else 0):
            assert self.mtp_layer is not None
            prefix = self.mtp_layer.format(index=index, number=model.num_layers + index)
            layers.append(prefix)
            entries += self._entries(self.mtp, Layer(prefix, "mtp.layers", index), NO_LAYER, model)
            inner = Layer(prefix, "mtp.layers", index, "transformer_layer.")
            entries += self._entries(self.layer, inner, model.mtp_kind, model)
            duplicates += [
                Duplicate(d.name.format(layer=prefix), d.of, d.when)
                for d in self.duplicates
                if d.when.test(model, NO_LAYER) and "{layer}" in d.name
            ]
        shapes = {name: shape for e in entries for name, shape in zip(e.hf, e.hf_shapes, strict=True)}
        fused = [tensor for layer in layers for rule in self.fused for tensor in _join(rule, layer, model, shapes)]
        return BoundMap(model, tuple(entries), tuple(duplicates), self.ignore, {t.name: t for t in fused}, self.modules,
                        self.live)  # fmt: skip

    @staticmethod
    def _entries(rules: Iterable[WeightRule], layer: Layer, kind: LayerKind, model: ModelShape) -> Iterator[Entry]:
        for rule in rules:
            if rule.when.test(model, kind):
                yield from _expand(rule, model, layer)


@lru_cache(maxsize=2)  # a command asks several times, with MTP blocks and without
def _bind(rules: WeightMap, model: ModelShape) -> BoundMap:
    return rules._bound(model)


@dataclass(frozen=True)
class Layer:
    """The names of a layer begin with `hf`, on the Megatron side with `{stack}.{index}.{inner}`; others have none."""

    hf: str = ""
    stack: str | None = None
    index: int | None = None
    inner: str = ""


@dataclass(frozen=True)
class Entry:
    """One Megatron tensor (or one expert's slice of it) and the HF tensors it is made of. Shapes leave out [E]."""

    name: str
    stack: str | None
    index: int | None
    expert: int | None
    hf: tuple[str, ...]
    hf_shapes: tuple[Shape, ...]
    shape: Shape
    rule: WeightRule = field(repr=False)
    model: ModelShape = field(repr=False)

    @property
    def mcore(self) -> str:
        """Canonical full name; experts of one layer share it."""
        return self.name if self.stack is None else f"{self.stack}.{self.index}.{self.name}"

    @property
    def label(self) -> str:
        return self.mcore if self.expert is None else f"{self.mcore}[expert {self.expert}]"

    @property
    def row_size(self) -> int:
        return self.rule.op.row_size(self.hf_shapes, self.model)

    @property
    def segments(self) -> tuple[Segment, ...]:
        """Rows of the HF tensors in the order of the Megatron tensor."""
        return self.rule.op.segments(self.hf_shapes, self.model)

    def inverse(self, source: int) -> tuple[Segment, ...]:
        """Rows of the Megatron tensor (as input 0) in the order of HF tensor number `source`."""
        return tuple(segment for _, segment in self.taken(source))

    def taken(self, source: int) -> list[tuple[int, Segment]]:
        """(row of HF tensor number `source`, rows of the Megatron tensor that begin with it), in the order of the former."""
        found, row = [], 0
        for segment in self.segments:
            if segment.source == source:
                found.append((segment.start, Segment(0, row, segment.size)))
            row += segment.size
        return sorted(found, key=lambda item: item[0])


def _expand(rule: WeightRule, model: ModelShape, layer: Layer) -> Iterator[Entry]:
    name = layer.inner + rule.mcore.removeprefix("{layer}.")
    shapes = tuple(tuple(model.dim(d) for d in s.dims) for s in rule.hf)
    shape = rule.op.out_shape(shapes, model)
    for expert in range(model.experts) if rule.per_expert else (None,):
        hf = tuple(s.name.format(layer=layer.hf, expert=expert) for s in rule.hf)
        yield Entry(name, layer.stack, layer.index, expert, hf, shapes, shape, rule, model)


def _join(rule: Fused, layer: str, model: ModelShape, shapes: Mapping[str, Shape]) -> Iterator[FusedTensor]:
    """The fused tensor of a layer, if it has the parts."""
    parts = [[part.format(layer=layer, expert=expert) for part in rule.parts] for expert in range(model.experts)]
    if parts and parts[0][0] in shapes:
        tensor = FusedTensor.of(rule.name.format(layer=layer), parts, shapes, rule.transposed, rule.interleaved)
        yield replace(tensor, of_part=rule.of_part)


def clip(segments: Iterable[Segment], start: int, stop: int) -> Iterator[Segment]:
    """The part of a gather that lands on output rows [start, stop)."""
    row = 0
    for segment in segments:
        low, high = max(start - row, 0), min(stop - row, segment.size)
        if low < high:
            yield Segment(segment.source, segment.start + low, high - low)
        row += segment.size
        if row >= stop:
            return


@dataclass(frozen=True)
class Coverage:
    """What a checkpoint holds besides the mapped tensors, by decision. carried: of other parts than the text model."""

    ignored: tuple[str, ...]
    duplicates: tuple[Duplicate, ...]
    carried: tuple[str, ...] = ()


@dataclass(frozen=True)
class BoundMap:
    """The rules written out for one model. fused: tensors that may stand for those of single experts, by name. modules and
    live: see WeightMap. naming: of the text part of a larger model, whose other tensors are carried.
    """

    model: ModelShape
    entries: tuple[Entry, ...]
    duplicates: tuple[Duplicate, ...]
    ignore: tuple[str, ...]
    fused: Mapping[str, FusedTensor] = field(default_factory=dict)
    modules: tuple[tuple[str, str], ...] = ()
    live: Naming = NAMINGS[0]
    naming: Naming | None = None

    def __post_init__(self) -> None:
        mcore = set[str]()
        checked = set[tuple[int, tuple[Shape, ...], int | None]]()  # experts and layers of one kind are all alike
        for entry in self.entries:
            if entry.label in mcore:
                raise MapError(f"{entry.label} is made by two rules")
            mcore.add(entry.label)
            if (kind := (id(entry.rule), entry.hf_shapes, None)) not in checked:
                checked.add(kind)
                rows, size = sum(segment.size for segment in entry.segments), math.prod(entry.shape)
                assert rows * entry.row_size == size, f"{entry.label}: {rows} rows for shape {entry.shape}"
        for name, uses in self.uses.items():
            entry, position = uses[0]
            use = (id(entry.rule), entry.hf_shapes, position)
            if len(uses) > 1 or use not in checked:
                _check_rows(name, uses)
            if len(uses) == 1:
                checked.add(use)

    @cached_property
    def uses(self) -> Mapping[str, Sequence[tuple[Entry, int]]]:
        """HF name -> every entry that takes rows of it, and its position among the entry's inputs."""
        found: dict[str, list[tuple[Entry, int]]] = {}
        for entry in self.entries:
            for position, name in enumerate(entry.hf):
                found.setdefault(name, []).append((entry, position))
        return found

    def named(self, naming: Naming | None) -> BoundMap:
        """The same under the names that files have."""
        if naming is None:
            return self
        entries = tuple(replace(entry, hf=tuple(map(naming, entry.hf))) for entry in self.entries)
        copies = tuple(replace(copy, name=naming(copy.name), of=naming(copy.of)) for copy in self.duplicates)
        fused = {
            naming(name): replace(
                tensor, name=naming(name), views={naming(part): view for part, view in tensor.views.items()}
            )
            for name, tensor in self.fused.items()
        }
        return replace(self, entries=entries, duplicates=copies, fused=fused, naming=naming)

    def as_stored(self, shapes: Mapping[str, Shape]) -> BoundMap:
        """The same for a checkpoint with these shapes, which may keep the matrices of all its fused tensors turned."""
        held = [tensor for name, tensor in self.fused.items() if name in shapes]
        if all(tuple(shapes[tensor.name]) == tensor.shape for tensor in held):
            return self
        if any(tuple(shapes[tensor.name]) != tensor.turned.shape for tensor in held):
            return self  # `check` says what is wrong
        return replace(self, fused={name: tensor.turned for name, tensor in self.fused.items()})

    def own_name(self, name: str) -> str:
        """The map's name for a tensor, or a module, that another release or tool names otherwise."""
        for stored, live in self.modules:
            name = name.replace(live, stored)
        if self.model.num_labels == 0 and not name.startswith(_TEXT_PARTS):
            name = _TEXT_PARTS[0] + name
        return name if self.naming is None else self.naming(text_name(name))

    def module_name(self, name: str) -> str:
        """What transformers' classes call one of the map's names, or a module of such a name."""
        for stored, live in self.modules:
            name = name.replace(stored, live)
        if self.model.num_labels == 0:  # the class of such a model has nothing around it
            name = name.removeprefix(_TEXT_PARTS[0])
        return name if self.naming is None else self.live(text_name(name))

    def is_carried(self, name: str) -> bool:
        """Whether a name in the files belongs to a part of the model that is no text model's."""
        return self.naming is not None and not self.naming.is_text(name)

    @cached_property
    def by_hf(self) -> Mapping[str, tuple[Entry, int]]:
        """HF name -> (the first entry that takes rows of it, its position among the entry's inputs)."""
        return {name: uses[0] for name, uses in self.uses.items()}

    @cached_property
    def groups(self) -> Sequence[Sequence[Entry]]:
        """The entries, those together that share an HF tensor."""
        found: dict[str, list[Entry]] = {}
        for entry in self.entries:
            group, *others = {id(found[n]): found[n] for n in entry.hf if n in found}.values() or [[]]
            for other in others:
                group += other
                found.update(dict.fromkeys((name for one in other for name in one.hf), group))
            group.append(entry)
            found.update(dict.fromkeys(entry.hf, group))
        return list({id(group): group for group in found.values()}.values())

    def parts(self, name: str) -> tuple[str, ...]:
        """The names in `by_hf` that a tensor of a checkpoint stands for: itself, or a fused one's parts."""
        return tuple(self.fused[name].views) if name in self.fused else (name,)

    def shape(self, name: str) -> Shape:
        """Of a tensor of a checkpoint."""
        if name in self.fused:
            return self.fused[name].shape
        entry, position = self.by_hf[name]
        return entry.hf_shapes[position]

    def rule(self, name: str) -> WeightRule:
        """Of a tensor of a checkpoint."""
        return self.by_hf[self.parts(name)[0]][0].rule

    @property
    def stored_names(self) -> tuple[str, ...]:
        """The tensors of a checkpoint, experts joined where the family's files have them so."""
        fused = [tensor for tensor in self.fused.values() if self.naming is not None or not tensor.of_part]
        joined = {part: tensor.name for tensor in fused for part in tensor.views}
        return tuple(dict.fromkeys(joined.get(name, name) for name in self.by_hf))

    def check(self, shapes: Mapping[str, Shape], where: str) -> Coverage:
        """Hold a checkpoint's HF names and shapes against the map.

        Args: shapes: name -> shape of every tensor in the checkpoint. where: the checkpoint, for messages.
        Raises: MapError naming missing and unknown tensors; ShapeError naming the first wrong shape.
        """
        duplicates = {d.name: d for d in self.duplicates}
        ignored, carried = [], []
        present, unknown = [], []
        held: dict[str, str] = {}
        for name in shapes:
            for part in self.parts(name):
                if held.setdefault(part, name) != name:
                    raise MapError(f"{where} holds {part} twice: in {held[part]} and in {name}")
            if name in self.by_hf or name in self.fused:
                continue
            if self.is_carried(name):
                carried.append(name)
            elif name in duplicates:
                present.append(duplicates[name])
            elif any(fnmatch.fnmatch(name, pattern) for pattern in self.ignore):
                ignored.append(name)
            else:
                unknown.append(name)
        missing = [name for name in self.by_hf if name not in held]
        if missing or unknown:
            raise MapError(f"{where} does not match its config.json: {listing('missing', missing)}"
                           f"{'; ' if missing and unknown else ''}{listing('unknown', unknown)}. Check that all files "
                           "of the model are there and that the model type is right (--model_type)")  # fmt: skip
        for name in dict.fromkeys(held[part] for part in self.by_hf):
            if tuple(shapes[name]) != self.shape(name):
                raise ShapeError(
                    f"{name} in {where} has shape {list(shapes[name])}, but config.json makes it "
                    f"{list(self.shape(name))}; the two files do not belong together"
                )
        return Coverage(tuple(ignored), tuple(present), tuple(carried))


def _check_rows(name: str, uses: Sequence[tuple[Entry, int]]) -> None:
    """Every row of an HF tensor is used exactly once. Raises: MapError for one that two rules take, or none does."""
    entry, position = uses[0]
    taken = sorted(
        (start, segment.size, user) for user, (one, i) in enumerate(uses) for start, segment in one.taken(i)
    )  # fmt: skip
    row, last = 0, entry
    for start, size, user in taken:
        one = uses[user][0]
        assert one.row_size == entry.row_size, f"{name}: {one.label} and {entry.label} count its rows differently"
        if start < row:
            raise MapError(f"{name} is claimed twice: by {last.label} and by {one.label}")
        assert start == row, f"{one.label}: row {row} of {name} is not used"
        row, last = start + size, one
    assert row * entry.row_size == math.prod(entry.hf_shapes[position]), f"{last.label}: rows of {name} are left over"
