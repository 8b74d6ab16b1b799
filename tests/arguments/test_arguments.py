"""The arguments of the Hugging Face side: template kwargs, sizes, checks, args.json."""

import json
from pathlib import Path

import pytest

from swiftlite.arguments.base import BaseArguments, normalize_dtype
from swiftlite.arguments.deploy import DeployArguments
from swiftlite.arguments.export import ExportArguments, parse_bytes
from swiftlite.arguments.infer import InferArguments
from swiftlite.arguments.megatron_train import MegatronSftArguments
from swiftlite.arguments.parser import parse, specs
from swiftlite.arguments.train import SftArguments
from swiftlite.utils.errors import UsageError

GOLDEN = Path(__file__).parents[1] / "golden/glm4_5_air"


def test_template_kwargs_of_an_export_equal_the_record():
    want = json.loads((GOLDEN / "template_kwargs.json").read_text())
    got = ExportArguments(model="DIR", to_mcore=True).get_template_kwargs()
    assert got == want and list(got) == list(want) and len(got) == 14


def test_template_kwargs_follow_the_settings():
    args = MegatronSftArguments(model="DIR", system="S", max_length=7, truncation_strategy="left",
                                loss_scale="last_round", response_prefix="<think>", padding_side="left")  # fmt: skip
    kwargs = args.get_template_kwargs()
    changed = {key: kwargs[key] for key in ("default_system", "max_length", "truncation_strategy", "loss_scale",
                                            "response_prefix", "padding_side", "sequence_parallel_size")}  # fmt: skip
    assert list(changed.values()) == ["S", 7, "left", "last_round", "<think>", "left", 1]


@pytest.mark.parametrize("cls", [BaseArguments, ExportArguments, InferArguments, SftArguments, MegatronSftArguments])
def test_fields_have_help_and_one_owner(cls):
    for name, spec in specs(cls).items():
        assert spec.help, name
        owners = [c for c in cls.__mro__ if name in c.__dict__.get("__annotations__", {})]
        assert len(owners) == 1, (name, owners)


@pytest.mark.parametrize("value", ["bf16", "bfloat16", "torch.bfloat16"])
def test_dtype_names(value):
    assert normalize_dtype(value) == BaseArguments(dtype=value).torch_dtype == "bfloat16"


def test_dtype_objects():
    import torch

    args = BaseArguments(torch_dtype=torch.float16)
    assert args.torch_dtype == "float16" and args.dtype is torch.float16
    assert BaseArguments().dtype is None and BaseArguments(torch_dtype="auto").torch_dtype is None


@pytest.mark.parametrize(
    "text, size", [("5GB", 5 * 10**9), ("4GiB", 4 * 2**30), ("512MB", 512 * 10**6), ("1.5g", 15 * 10**8), ("77", 77)]
)
def test_sizes(text, size):
    assert parse_bytes(text, "max_memory") == size


@pytest.mark.parametrize("text", ["5XB", "GB", "-1GB", "", "five"])
def test_wrong_sizes(text):
    with pytest.raises(UsageError, match="must be a size like 5GB"):
        parse_bytes(text, "max_memory")


@pytest.mark.parametrize(
    "cls, kwargs, message",
    [
        (ExportArguments, {"dry_run": True, "gpu_memory": "24"}, "is 24 bytes; write 24GB"),
        (ExportArguments, {"dry_run": True, "gpu_memory": "512MB"}, "is 512000000 bytes, too few"),
        (ExportArguments, {"max_shard_size": "5"}, "is 5 bytes; write 5GB"),
        (ExportArguments, {"to_mcore": True, "to_hf": True, "model": "x", "mcore_model": "y"}, "give one direction"),
        (ExportArguments, {"to_mcore": True}, "--model DIR_OR_ID"),
        (ExportArguments, {"to_hf": True}, "--mcore_model DIR"),
        (ExportArguments, {"thread_count": 0}, "--thread_count 0: must be at least 1"),
        (ExportArguments, {"test_convert_dtype": "int4"}, "--test_convert_dtype int4"),
        (InferArguments, {"prompt": "a", "val_dataset": ["b"]}, "give one of them"),
        (InferArguments, {"result_path": "a"}, "needs --val_dataset FILE"),
        (InferArguments, {"temperature": -1}, "--temperature -1: must be 0 or more"),
        (InferArguments, {"top_p": 1.5}, "--top_p 1.5: must be between 0 and 1"),
        (InferArguments, {"top_k": -1}, "--top_k -1: must be 0 or more"),
        (InferArguments, {"num_beams": 0}, "--num_beams 0: must be at least 1"),
        (InferArguments, {"repetition_penalty": 0.0}, "--repetition_penalty 0.0: must be above 0"),
        (DeployArguments, {"port": 99999}, "--port 99999: must be between 1 and 65535"),
        (BaseArguments, {"split_dataset_ratio": 2}, "--split_dataset_ratio 2: must be between 0 and 1"),
        (BaseArguments, {"max_length": 0}, "--max_length 0: must be at least 1"),
        (BaseArguments, {"truncation_strategy": "cut"}, "must be one of delete, left, right, split, raise"),
        (BaseArguments, {"dataset_num_proc": 0}, "--dataset_num_proc 0"),
    ],
)
def test_checks(cls, kwargs, message):
    with pytest.raises(UsageError, match=message):
        cls(**kwargs)


def test_data_seed_follows_seed():
    assert BaseArguments(seed=7).data_seed == 7
    assert BaseArguments(seed=7, data_seed=8).data_seed == 8


def test_device_map_may_be_json():
    args = parse(InferArguments, ["--model", "DIR", "--device_map", '{"": 0}'])
    assert args.device_map == {"": 0}
    assert InferArguments(model="DIR", device_map="auto").device_map == "auto"


def test_save_is_json_and_keeps_tokens_secret(tmp_path):
    import torch

    args = InferArguments(model="DIR", torch_dtype=torch.bfloat16, hub_token="secret", new_special_tokens=["<a>"])
    values = json.loads(args.save(tmp_path).read_text())
    assert (
        values["torch_dtype"] == "bfloat16" and values["hub_token"] is None and values["new_special_tokens"] == ["<a>"]
    )
    assert "secret" not in (tmp_path / "args.json").read_text()
    assert set(specs(InferArguments)) < set(values)
