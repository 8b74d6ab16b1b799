"""The precision check: does a converted checkpoint compute what the Hugging Face model computes?

Both models run layer by layer, so memory holds one layer of each. Besides the free run, each Megatron part is also fed
Hugging Face's own input of that part, so that a fault shows in the part that has it and not in all that follow.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint import FileSystemReader, LoadPlan, LoadPlanner
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from swiftlite.arguments.megatron_export import conversion_arguments
from swiftlite.checkpoint.bind import bind_map, convert_hf_config
from swiftlite.checkpoint.side_files import read_config
from swiftlite.megatron.hf_io import flatten_shards
from swiftlite.utils.errors import ConfigError, VerifyError
from swiftlite.utils.logger import get_logger
from swiftlite.weights.dcp_file import TorchDistSource
from swiftlite.weights.fp8 import open_source
from swiftlite.weights.safetensors import SafetensorsSource
from swiftlite.weights.storage import Files, decoder, read_tensor
from swiftlite.weights.torch_dist import find_iteration, slot_of

NUM_TOKENS = 512
MESSAGES = [
    {"role": "user", "content": "What does a checkpoint converter have to preserve?"},
    {"role": "assistant", "content": "Every weight, bit for bit, and therefore every logit."},
]


@dataclass(frozen=True)
class Tolerance:
    """part: relative error (L2) of one part fed the same input. logits: error of the free run, in fp32 the largest
    difference / scale; in lower precision, where one token whose experts tip over moves its logits, the L2 error."""

    part: float
    logits: float


# Chosen from the dtype's rounding: 2^-24, 2^-11, 2^-8 per operation, times the few hundred roundings of a layer.
TOLERANCES = {
    torch.float32: Tolerance(2e-5, 1e-4),
    torch.float16: Tolerance(3e-2, 1e-1),
    torch.bfloat16: Tolerance(1e-1, 3e-1),
}


@dataclass(frozen=True)
class Part:
    """One step of the model. forced: relative error when fed Hugging Face's input; free: of the models' own runs."""

    name: str
    forced: float
    free: float


@dataclass
class PrecisionReport:
    """What the check measured. Differences of logits are absolute; scale is max(1, max |HF logits|)."""

    dtype: torch.dtype
    num_tokens: int
    hf_tensors: int
    hf_parameters: int
    mcore_tensors: int
    mcore_parameters: int
    parts: list[Part] = field(default_factory=list)
    logits_max_diff: float = math.inf
    logits_mean_diff: float = math.inf
    logits_rel_error: float = math.inf
    scale: float = 1.0
    argmax_agreement: float = 0.0

    def fault(self) -> str | None:
        """What is beyond tolerance, the first part first; None if nothing is."""
        tolerance = TOLERANCES[self.dtype]
        for part in self.parts:
            if not part.forced <= tolerance.part:
                return (
                    f"{part.name} is off: relative error {part.forced:.2e} on the same input, allowed "
                    f"{tolerance.part:.0e}"
                )
        if self.dtype != torch.float32:
            if not self.logits_rel_error <= tolerance.logits:
                return f"the logits are off: relative error {self.logits_rel_error:.2e}, allowed {tolerance.logits:.0e}"
        elif not self.logits_max_diff <= tolerance.logits * self.scale:
            return (
                f"the logits are off: largest difference {self.logits_max_diff:.2e}, allowed "
                f"{tolerance.logits:.0e} x scale {self.scale:.1f}"
            )
        return None


@contextmanager
def groups_of_check(hf_dir: Path) -> Iterator[None]:
    """megatron-core's groups for a check that one of several processes makes: all must make them. Collective."""
    from swiftlite.megatron.distributed import parallel_groups

    with parallel_groups(conversion_arguments(convert_hf_config(read_config(hf_dir)), "", torch.float32)):
        yield


def check_precision(
    hf_dir: Path,
    mcore_dir: Path,
    args: Any = None,
    source: SafetensorsSource | None = None,
    vocab_size: int | None = None,
    cast_to: torch.dtype | None = None,
) -> PrecisionReport:
    """Run both models on one conversation and compare every part and the logits.

    Args: hf_dir: Hugging Face directory. mcore_dir: torch_dist checkpoint (root or iteration) whose config.json, if it
        has one, describes it. args: ExportArguments (test_convert_dtype, template, trust_remote_code), all optional.
        source, vocab_size: the Hugging Face side with added vocabulary rows, where it is not `hf_dir` as it stands.
        cast_to: dtype that the conversion wrote; both sides' weights are rounded to it, so that only mistakes differ.
    Raises: VerifyError naming the first part that is off.
    """
    log = get_logger()
    dtype = getattr(torch, getattr(args, "test_convert_dtype", None) or "float32")
    if dtype == torch.float32:  # before CUDA starts: Transformer Engine multiplies fp32 in TF32 otherwise
        os.environ.setdefault("NVIDIA_TF32_OVERRIDE", "0")
    iteration = find_iteration(Path(mcore_dir))
    ids = _token_ids(Path(hf_dir), args)
    hf_source, mcore_source = source or open_source(Path(hf_dir), read_config(Path(hf_dir))), TorchDistSource(iteration)
    report = PrecisionReport(
        dtype, ids.shape[1], len(hf_source.tensors), sum(t.spec.numel for t in hf_source.tensors.values()),
        len(mcore_source.tensors), sum(t.spec.numel for t in mcore_source.tensors.values()),
    )  # fmt: skip
    log.info(
        "precision check: %d tokens in %s, one layer of each model at a time%s", report.num_tokens, dtype,
        "; Hugging Face's side has the same weights dequantised or merged" if decoder(hf_source) else "",
    )  # fmt: skip
    model = _build_hf(Path(hf_dir), dtype, getattr(args, "trust_remote_code", False), vocab_size)
    bound = bind_map(read_config(Path(hf_dir)), hf_source.tensors)
    rounding = Rounding(cast_to, {n for e in bound.entries if e.rule.keep_dtype for n in (*e.hf, slot_of(e).key)})
    hf = _run_hf(model, hf_source, ids, dtype, rounding)
    config_dir = iteration.parent if (iteration.parent / "config.json").is_file() else Path(hf_dir)
    _run_mcore(iteration, read_config(config_dir), ids, dtype, hf, report, rounding)
    _log(report)
    fault = report.fault()
    if fault:
        raise VerifyError(
            f"the converted model does not compute what the Hugging Face model computes: {fault}. "
            "The checkpoint is not usable; please report the model type and this line"
        )
    return report


def _log(report: PrecisionReport) -> None:
    log = get_logger()
    log.info(
        "parameters: Hugging Face %d in %d tensors, Megatron %d in %d", report.hf_parameters, report.hf_tensors,
        report.mcore_parameters, report.mcore_tensors,
    )  # fmt: skip
    for part in report.parts:
        log.info("%-16s relative error %.2e on the same input, %.2e in the free run", part.name, part.forced, part.free)
    log.info(
        "logits: max diff %.2e, mean diff %.2e, relative error %.2e, scale %.1f, argmax agreement %.2f %%",
        report.logits_max_diff, report.logits_mean_diff, report.logits_rel_error, report.scale,
        100 * report.argmax_agreement,
    )  # fmt: skip


def _token_ids(hf_dir: Path, args: Any) -> Tensor:
    """[1, NUM_TOKENS]: a conversation in the model's template where there is a tokenizer, then arbitrary ids."""
    config = read_config(hf_dir)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, config["vocab_size"], (1, NUM_TOKENS), generator=generator)
    if any((hf_dir / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        from swiftlite.llm.model.loader import load_tokenizer

        tokenizer = load_tokenizer(str(hf_dir), trust_remote_code=getattr(args, "trust_remote_code", False))
        template = getattr(args, "template", None)
        if template:
            from swiftlite.llm.template.register import get_template

            text = get_template(template, tokenizer).render(MESSAGES)
        else:
            text = "\n".join(m["content"] for m in MESSAGES)
        encoded = [i for i in tokenizer(text, add_special_tokens=False)["input_ids"] if i < config["vocab_size"]]
        count = min(len(encoded), NUM_TOKENS)
        ids[0, :count] = torch.tensor(encoded[:count], dtype=ids.dtype)
    return ids


def relative_error(mine: Tensor, reference: Tensor) -> float:
    """|mine - reference| / |reference| in L2 norms, computed in fp64."""
    mine, reference = mine.double(), reference.double()
    return float((mine - reference).norm() / reference.norm().clamp_min(1e-30))


@dataclass(frozen=True)
class Rounding:
    """Rounds a weight to `dtype` (None: leaves it), but for the names in `kept`."""

    dtype: torch.dtype | None
    kept: set[str]

    def __call__(self, name: str, tensor: Tensor) -> Tensor:
        return tensor if self.dtype is None or name in self.kept else tensor.to(self.dtype)


# ---- Hugging Face, one layer at a time ----


@dataclass
class HfRun:
    """Outputs of the Hugging Face model, on the CPU: embedding, each layer and norm [1, S, H], logits [1, S, V]."""

    embedding: Tensor
    layers: list[Tensor]
    norm: Tensor
    logits: Tensor


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Parameters of modules built inside take no memory; buffers are real."""
    original = nn.Module.register_parameter

    def register(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        original(module, name, parameter)
        if parameter is not None:
            module._parameters[name] = nn.Parameter(parameter.to("meta"), requires_grad=False)

    nn.Module.register_parameter = register  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = original  # type: ignore[method-assign]


def hf_config(hf_dir: Path, trust_remote_code: bool = False) -> Any:
    """The config object of a directory: of the code that it brings if that is trusted, else transformers' or ours."""
    from transformers import AutoConfig
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    from swiftlite.llm.model import reference

    raw = read_config(hf_dir)
    own = raw.get("auto_map", {}).get("AutoConfig")
    if trust_remote_code and own:  # asked for by name: AutoConfig would prefer a reference class that is registered
        config_class: Any = get_class_from_dynamic_module(own, str(hf_dir))
        return config_class.from_pretrained(hf_dir, name_or_path=str(hf_dir))  # where the model's class is looked for
    reference.register()
    if raw.get("model_type") == "kimi_k2":  # DeepSeek-V3 under another name
        return AutoConfig.for_model(**{**raw, "model_type": "deepseek_v3"})
    return AutoConfig.from_pretrained(hf_dir, trust_remote_code=False)


def _build_hf(hf_dir: Path, dtype: torch.dtype, trust_remote_code: bool, vocab_size: int | None) -> nn.Module:
    """The Hugging Face model without weights. Raises: ConfigError if transformers cannot build it."""
    from transformers import AutoModelForCausalLM

    from swiftlite.llm.model.corrections import correct

    try:
        config = hf_config(hf_dir, trust_remote_code)
        config.vocab_size = vocab_size or config.vocab_size
        if hasattr(config, "quantization_config"):  # the weights come dequantised
            del config.quantization_config
        with _parameters_on_meta():
            model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
    except (ValueError, KeyError, ImportError, OSError) as error:
        raise ConfigError(
            f"transformers cannot build {read_config(hf_dir).get('architectures')} for the precision check "
            f"({' '.join(str(error).split())}); "
            "if the checkpoint brings its own code, allow it with --trust_remote_code true"
        ) from None
    return correct(model).eval()  # type: ignore[no-any-return]


class _HfWeights:
    """Puts the weights of one part of a Hugging Face model in place, and takes them out again."""

    def __init__(
        self, source: SafetensorsSource, files: Files, dtype: torch.dtype, device: torch.device, rounding: Rounding
    ) -> None:
        self.source, self.files, self.dtype, self.device, self.rounding = source, files, dtype, device, rounding
        self.decode = decoder(source)

    def _read(self, name: str) -> Tensor:
        name = name.replace(".gate.moe_statics.", ".moe_statics.")  # ernie: one level deeper in memory than on disk
        if name not in self.source.tensors and name == "lm_head.weight":
            name = "model.embed_tokens.weight"
        if name in self.source.tensors:
            return self._values(name)
        prefix, _, leaf = name.rpartition(".experts.")
        if leaf == "gate_up_proj":  # transformers 5 keeps all experts of a layer in one tensor [E, 2I, H]
            return torch.stack([torch.cat(pair) for pair in self._experts(prefix, "gate_proj", "up_proj")])
        if leaf == "down_proj":
            return torch.stack([down for (down,) in self._experts(prefix, "down_proj")])
        raise ConfigError(f"{name} of the Hugging Face model is not in {self.source.directory}")

    def _values(self, name: str) -> Tensor:
        tensor = read_tensor(self.source, name, self.files)
        if self.decode is not None:  # rounded as the conversion writes it
            tensor = self.decode(name, 0, tensor).view(tensor.shape)
            tensor = tensor if self.rounding.dtype else tensor.to(self.source.value_dtype(name))
        return self.rounding(name, tensor)

    def _experts(self, prefix: str, *names: str) -> Iterator[tuple[Tensor, ...]]:
        expert = 0
        while f"{prefix}.experts.{expert}.{names[0]}.weight" in self.source.tensors:
            yield tuple(self._values(f"{prefix}.experts.{expert}.{n}.weight") for n in names)
            expert += 1

    def load(self, part: nn.Module, prefix: str) -> None:
        for path, module in part.named_modules():
            for name in list(module._parameters):
                if module._parameters[name] is not None:
                    tensor = self._read(".".join(filter(None, (prefix, path, name))))
                    module._parameters[name] = nn.Parameter(tensor.to(self.device, self.dtype), requires_grad=False)
            for name, buffer in module._buffers.items():
                if buffer is not None and name not in module._non_persistent_buffers_set:
                    full = ".".join(filter(None, (prefix, path, name)))
                    buffer.copy_(self._read(full).view_as(buffer))

    def drop(self, part: nn.Module) -> None:
        for module in part.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    module._parameters[name] = nn.Parameter(parameter.to("meta"), requires_grad=False)


def _run_hf(model: Any, source: SafetensorsSource, ids: Tensor, dtype: torch.dtype, rounding: Rounding) -> HfRun:
    from swiftlite.megatron import backend

    device = backend.setup().device
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = buffer.to(device)
    inner = model.model
    outputs: dict[str, Tensor] = {}
    with Files() as files, torch.no_grad():
        weights = _HfWeights(source, files, dtype, device, rounding)

        def watch(part: nn.Module, name: str) -> None:
            part.register_forward_pre_hook(lambda module, _: weights.load(module, name))

            def done(module: nn.Module, _: Any, output: Any) -> None:
                outputs[name] = (output[0] if isinstance(output, tuple) else output).detach().cpu()
                weights.drop(module)

            part.register_forward_hook(done)

        watch(inner.embed_tokens, "model.embed_tokens")
        watch(inner.norm, "model.norm")
        watch(model.lm_head, "lm_head")
        for index, layer in enumerate(inner.layers):
            watch(layer, f"model.layers.{index}")
        model(input_ids=ids.to(device), use_cache=False)
    layers = [outputs[f"model.layers.{i}"] for i in range(len(inner.layers))]
    return HfRun(outputs["model.embed_tokens"], layers, outputs["model.norm"], outputs["lm_head"])


# ---- Megatron, one layer at a time ----


class _McoreWeights:
    """The same for a GPTModel: one tensor at a time, by the keys and offsets that megatron-core gives it."""

    def __init__(self, iteration: Path, device: torch.device, rounding: Rounding) -> None:
        self.iteration, self.device, self.rounding = iteration, device, rounding
        self.reader = FileSystemReader(iteration)
        self.metadata = self.reader.read_metadata()
        self.reader.set_up_storage_reader(self.metadata, True)
        self._shapes: dict[nn.Parameter, torch.Size] = {}

    def release(self, part: nn.Module) -> None:
        for parameter in part.parameters():
            self._shapes.setdefault(parameter, parameter.shape)
            parameter.data = torch.empty(0, dtype=parameter.dtype)

    def load(self, part: nn.Module, prefix: str, offsets: tuple[Any, ...] = ()) -> None:
        """Fill `part` from the checkpoint through torch's reader, by the module's own sharded_state_dict.

        Raises: VerifyError naming a tensor that the checkpoint does not hold or that nothing was read into.
        """
        from megatron.core.transformer.utils import sharded_state_dict_default

        for parameter in part.parameters():
            parameter.data = torch.empty(self._shapes[parameter], dtype=parameter.dtype)
        state = sharded_state_dict_default(part, prefix, offsets)
        filled = set()
        for shard in flatten_shards(state):
            self._read(shard)
            filled.add(shard.data.untyped_storage().data_ptr())
        for name, tensor in part.state_dict().items():
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in filled:
                if "_extra_state" not in name and tensor.numel():
                    raise VerifyError(f"{prefix}{name} was not loaded from {self.iteration}")
        for parameter in part.parameters():
            parameter.data = parameter.data.to(self.device)

    def _read(self, shard: Any) -> None:
        """Read one shard into its tensor, with torch.distributed.checkpoint's own reader."""
        stored = self.metadata.state_dict_metadata.get(shard.key)
        if not isinstance(stored, TensorStorageMetadata):
            raise VerifyError(f"{shard.key} is not in {self.iteration}")
        size = torch.Size((1,) * shard.prepend_axis_num + tuple(shard.local_shape))
        chunk = ChunkStorageMetadata(torch.Size(shard.global_offset), size)
        raw = torch.empty(size, dtype=stored.properties.dtype)
        plan = LoadPlan(create_read_items_for_chunk_list(shard.key, stored, [chunk]))
        self.reader.read_data(plan, cast("LoadPlanner", _IntoTensor(raw))).wait()
        shard.data.copy_(self.rounding(shard.key, raw.view(shard.data.shape)))


class _IntoTensor:
    """The part of a LoadPlanner that reading into one tensor needs."""

    def __init__(self, target: Tensor) -> None:
        self.target = target

    def resolve_tensor(self, item: Any) -> Tensor:
        for dim, (start, length) in enumerate(zip(item.dest_offsets, item.lengths, strict=True)):
            self = _IntoTensor(self.target.narrow(dim, start, length))
        return self.target

    def commit_tensor(self, item: Any, tensor: Tensor) -> None:
        pass


def _run_mcore(
    iteration: Path,
    config: Mapping[str, Any],
    ids: Tensor,
    dtype: torch.dtype,
    hf: HfRun,
    report: PrecisionReport,
    rounding: Rounding,
) -> None:
    """Run the Megatron model, free and fed with `hf`; fills `report`."""
    from swiftlite.megatron import backend
    from swiftlite.megatron.distributed import parallel_groups
    from swiftlite.megatron.model.provider import build_models

    fields = convert_hf_config(config)
    args = conversion_arguments(fields, str(iteration.parent), dtype)
    device = backend.setup().device
    with parallel_groups(args), torch.no_grad():
        model = build_models(args)[0].eval()
        weights = _McoreWeights(iteration, device, rounding)
        for parameter in model.parameters():  # norms come in fp32; training casts them, and so does Hugging Face
            parameter.data = parameter.data.to(dtype)
        weights.release(model)
        for name, buffer in model.named_buffers():
            parent, _, leaf = name.rpartition(".")
            model.get_submodule(parent)._buffers[leaf] = buffer.to(device)
        stacked, layers = not fields.get("num_experts"), len(model.decoder.layers)
        tied = model.share_embeddings_and_output_weights

        def compare(name: str, free: Tensor, forced: Tensor, reference: Tensor) -> None:
            reference = reference.to(device)
            report.parts.append(Part(name, relative_error(forced, reference), relative_error(free, reference)))

        def watch(
            part: nn.Module,
            name: str,
            load: Callable[[nn.Module], None],
            check: Callable[..., None],
            keep: bool = False,
        ) -> None:
            part.register_forward_pre_hook(lambda module, _: load(module))

            def done(module: nn.Module, inputs: Any, kwargs: Any, output: Any) -> None:
                free = output[0] if isinstance(output, tuple) else output
                check(name, module, inputs, kwargs, free)
                if not keep:
                    weights.release(module)

            part.register_forward_hook(done, with_kwargs=True)

        def check_embedding(name: str, module: nn.Module, inputs: Any, kwargs: Any, free: Tensor) -> None:
            compare(name, _batch_first(free), _batch_first(free), hf.embedding)

        def check_layer(name: str, module: nn.Module, inputs: Any, kwargs: Any, free: Tensor) -> None:
            index = int(name.split()[1])
            fed = _sequence_first(hf.layers[index - 1] if index else hf.embedding).to(device)
            kwargs = {**kwargs, "hidden_states": fed}
            forced = module.forward(*inputs[1:], **kwargs)
            compare(name, _batch_first(free), _batch_first(_first(forced)), hf.layers[index])

        def check_norm(name: str, module: nn.Module, inputs: Any, kwargs: Any, free: Tensor) -> None:
            forced = module.forward(_sequence_first(hf.layers[-1]).to(device))
            compare(name, _batch_first(free), _batch_first(_first(forced)), hf.norm)

        def check_output(name: str, module: nn.Module, inputs: Any, kwargs: Any, free: Tensor) -> None:
            forced = module.forward(_sequence_first(hf.norm).to(device), *inputs[1:], **kwargs)
            compare(name, _batch_first(free), _batch_first(_first(forced)), hf.logits)

        embedding, block = model.embedding, model.decoder
        watch(embedding, "embedding", lambda m: weights.load(m, "embedding."), check_embedding, keep=tied)
        for index, layer in enumerate(block.layers):
            prefix = "decoder.layers." if stacked else f"decoder.layers.{index}."
            offsets = ((0, index, layers),) if stacked else ()
            load = functools.partial(weights.load, prefix=prefix, offsets=offsets)
            watch(layer, f"layer {index}", load, check_layer)
        watch(
            block.final_layernorm, "final_layernorm",
            lambda m: weights.load(m, "decoder.final_layernorm."), check_norm,
        )  # fmt: skip
        load_output = (lambda m: None) if tied else (lambda m: weights.load(m, "output_layer."))
        watch(model.output_layer, "output_layer", load_output, check_output, keep=tied)
        positions = torch.arange(ids.shape[1], device=device)[None]
        logits = model(ids.to(device), positions, None)
    difference = (logits.float() - hf.logits.to(device).float()).abs()
    report.scale = max(1.0, float(hf.logits.float().abs().max()))
    report.logits_max_diff, report.logits_mean_diff = float(difference.max()), float(difference.mean())
    report.logits_rel_error = relative_error(logits, hf.logits.to(device))
    report.argmax_agreement = float((logits.argmax(-1).cpu() == hf.logits.argmax(-1)).float().mean())


def _first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output  # type: ignore[no-any-return]


def _batch_first(x: Tensor) -> Tensor:
    """[S, B, ...] -> [B, S, ...]."""
    return x.transpose(0, 1)


def _sequence_first(x: Tensor) -> Tensor:
    """[B, S, ...] -> [S, B, ...]."""
    return x.transpose(0, 1).contiguous()
