"""The Hugging Face side of the precision check: the model on the meta device, run with one part of its weights at a time."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from swiftlite.checkpoint.checkpoint import Checkpoint
from swiftlite.checkpoint.info import read_config
from swiftlite.families import family_of
from swiftlite.families.hf_config import architecture_of, wrapped_family
from swiftlite.llm.model.names import Stored, checkpoint_tensors
from swiftlite.utils.errors import ConfigError
from swiftlite.utils.types import Settings
from swiftlite.weights.storage import Files, decoder, read_tensor

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


@dataclass(frozen=True)
class Rounding:
    """Rounds a weight to `dtype` (None: leaves it), but for the names in `kept`."""

    dtype: torch.dtype | None
    kept: set[str]

    def __call__(self, name: str, tensor: Tensor) -> Tensor:
        return tensor if self.dtype is None or name in self.kept else tensor.to(self.dtype)


@dataclass
class HfRun:
    """Outputs of the Hugging Face model, on the CPU: its embeddings as the first layer gets them, each layer and norm
    [1, S, H], the model's logits [1, S, V], which are those of its head, capped or scaled where it does so; of a
    classifier the scores of every token.
    """

    embedding: Tensor
    layers: list[Tensor]
    norm: Tensor
    logits: Tensor


def hf_config(hf_dir: Path, trust_remote_code: bool = False) -> PretrainedConfig:
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
    is_part = wrapped_family(raw) is not None
    alias = None if is_part else family_of(architecture_of(raw)).aliases.get(str(raw.get("model_type")))
    if alias:
        return AutoConfig.for_model(**{**raw, "model_type": alias})
    return AutoConfig.from_pretrained(hf_dir, trust_remote_code=False)


def build_hf(hf: Checkpoint, dtype: torch.dtype, trust_remote_code: bool) -> PreTrainedModel:
    """The Hugging Face model without weights. Raises: ConfigError if transformers cannot build it."""
    from accelerate import init_empty_weights

    from swiftlite.llm.model.corrections import correct
    from swiftlite.llm.model.loader import auto_class

    hf_dir = hf.root
    try:
        config = hf_config(hf_dir, trust_remote_code)
        for part in (config, config.get_text_config()):
            part.vocab_size = hf.shape.vocab
            if hf.shape.num_labels:
                part.num_labels = hf.shape.num_labels
            if hf.bound.naming is not None:  # whose default differs by release
                part.tie_word_embeddings = hf.shape.tied
            if hasattr(part, "quantization_config"):  # the weights come dequantised
                del part.quantization_config
        with init_empty_weights(include_buffers=False):
            built = auto_class(hf.config)
            model = built.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
        model.tie_weights()  # each place got a parameter of its own
    except (ValueError, KeyError, ImportError, OSError) as error:
        raise ConfigError(
            f"transformers cannot build {' '.join(read_config(hf_dir).get('architectures') or ())} for the precision check "
            f"({' '.join(str(error).split())}); "
            "if the checkpoint brings its own code, allow it with --trust_remote_code true"
        ) from None
    return correct(model).eval()  # type: ignore[no-any-return]


def text_model(model: Any) -> Any:
    """Embedding, layers and final norm of a causal language model, or of the text part of one that reads images too."""
    is_part = model.config.get_text_config() is not model.config
    decoder = model.get_decoder() if is_part else model
    return getattr(decoder, "model", decoder)  # Llama 4 gives its causal language model


def head_of(model: PreTrainedModel) -> Any:
    """The output layer of a language model, or a classifier's head."""
    return model.get_output_embeddings() if model.get_output_embeddings() is not None else model.score


class _Weights:
    """Puts the weights of one part of a model in place, and takes them out again."""

    def __init__(
        self, model: PreTrainedModel, hf: Checkpoint, files: Files, dtype: torch.dtype, device: torch.device,
        rounding: Rounding,
    ) -> None:  # fmt: skip
        self.source, self.own_name = hf.stored, hf.bound.own_name
        self.files = files
        self.rounding = rounding
        self.dtype, self.device = dtype, device
        self.decode = decoder(hf.stored)
        self.stored: dict[int, list[tuple[str, Stored]]] = {}
        for name, stored in checkpoint_tensors(model, [text_model(model), head_of(model)]).items():
            self.stored.setdefault(id(stored.owner), []).append((name, stored))
        self.empty = {(m, name): p for m in model.modules() for name, p in m._parameters.items() if p is not None}

    def _fill(self, owner: Tensor, target: Tensor) -> None:
        """Read what lies in `owner`, which is in the shape of the model, into `target`."""
        places = self.stored[id(owner)]
        named = [(self.own_name(name), stored.view) for name, stored in places]
        held = [(name, view) for name, view in named if name in self.source.names]
        if sum(view.numel() for _, view in held) < owner.numel():
            missing = next(name for name, _ in named if name not in self.source.names)
            raise ConfigError(f"{missing} of the Hugging Face model is not in {self.source.files[0].parent}")
        for name, view in held:
            place = target.as_strided(view.shape, view.stride(), view.storage_offset())
            values = self._values(name)
            if values.dim() == 3 and values.shape != view.shape:  # matrices of experts, which files have either way
                values = values.transpose(1, 2)
            place.copy_(values.reshape(view.shape))

    def _values(self, name: str) -> Tensor:
        tensor = read_tensor(self.source, name, self.files)
        if self.decode is not None:  # rounded as the conversion writes it
            tensor = self.decode(name, 0, tensor).view(tensor.shape)
            tensor = tensor if self.rounding.dtype else tensor.to(self.source.value_dtype(name))
        return self.rounding(name, tensor)

    def load(self, part: nn.Module) -> None:
        for module in part.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    target = torch.empty(parameter.shape, dtype=self.dtype, device=self.device)
                    self._fill(self.empty[module, name], target)
                    module._parameters[name] = nn.Parameter(target, requires_grad=False)
            for name, buffer in module._buffers.items():
                if buffer is not None and name not in module._non_persistent_buffers_set:
                    self._fill(buffer, buffer)

    def drop(self, part: nn.Module) -> None:
        for module in part.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    module._parameters[name] = self.empty[module, name]


def run_hf(
    model: PreTrainedModel, hf: Checkpoint, ids: Tensor, dtype: torch.dtype, device: torch.device, rounding: Rounding
) -> HfRun:
    """One forward pass of `ids` [1, S] through the model of `build_hf`, its weights read from `hf`."""
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = buffer.to(device)
    inner, head = text_model(model), head_of(model)
    embedding = inner.get_input_embeddings()
    outputs: dict[nn.Module, Tensor] = {}
    with Files() as files, torch.no_grad():
        weights = _Weights(model, hf, files, dtype, device, rounding)

        def done(module: nn.Module, _: object, output: Tensor | tuple[Tensor, ...]) -> None:
            outputs[module] = (output[0] if isinstance(output, tuple) else output).detach().cpu()
            weights.drop(module)

        def embedded(_: nn.Module, args: tuple[Tensor, ...], kwargs: Settings) -> None:
            outputs[embedding] = (args or (kwargs["hidden_states"],))[0].detach().cpu()

        for part in (embedding, *inner.layers, inner.norm, head):
            part.register_forward_pre_hook(lambda module, _: weights.load(module))
            part.register_forward_hook(done)
        inner.layers[0].register_forward_pre_hook(embedded, with_kwargs=True)
        weights.load(inner.embed_tokens)  # Llama 4 asks where it is before it calls it
        inputs = ids.to(device)
        # Of GLM-4.5V, transformers 4.57 computes nothing without a mask.
        logits = model(input_ids=inputs, attention_mask=torch.ones_like(inputs), use_cache=False).logits.cpu()
    layers = [outputs[layer] for layer in inner.layers]
    if hf.shape.num_labels:  # the model's are those of the last token alone
        logits = outputs[head]
    return HfRun(outputs[embedding], layers, outputs[inner.norm], logits)
