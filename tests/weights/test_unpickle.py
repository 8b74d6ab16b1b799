"""Pickles in checkpoints: data comes in, code does not. One payload per kind of file; each would make a file `ran`."""

from __future__ import annotations

import io
import os
import pickle
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader, load, save
from torch.distributed.checkpoint import filesystem as dcp

from swiftlite.utils.errors import CheckpointError, reason
from swiftlite.utils.io import only_data
from swiftlite.weights import unpickle
from swiftlite.weights.dcp_file import TorchDistSource, load_common
from swiftlite.weights.unpickle import guard_checkpoint_reader, read_metadata


class Payload:
    """Makes the file `ran` in the working directory when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, ("ran",))


@pytest.fixture(autouse=True)
def watched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Fails the test if a payload ran."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(dcp, "pickle", pickle)
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")  # also where the environment asks for it
    monkeypatch.delenv("TORCH_FORCE_WEIGHTS_ONLY_LOAD", raising=False)
    yield
    assert not (tmp_path / "ran").exists()


def by_name(module: str, name: str) -> bytes:
    """A pickle of protocol 4 that calls module.name("ran"); dots in the name are walked."""
    short = [b"\x8c" + bytes([len(t)]) + t.encode() for t in (module, name, "ran")]
    return b"\x80\x04" + short[0] + short[1] + b"\x93" + short[2] + b"\x85R."


NAMES = [
    ("torch.serialization", "os.mkdir"), ("torch.distributed.checkpoint.filesystem", "os.mkdir"), ("torch", "os.mkdir"),
    ("torch.distributed.checkpoint.metadata", "os.mkdir"), ("posix", "mkdir"), ("builtins", "eval"),
    ("torch.serialization", "load"), ("torch.distributed.checkpoint.filesystem", "FileSystem"),
    ("pathlib", "Path.mkdir"), ("builtins", "set.__init__"), ("collections", "OrderedDict.fromkeys"),
    ("swiftlite.weights.unpickle", "os.mkdir"), ("torch", "load"), ("torch.distributed.checkpoint.filesystem", "os"),
]  # fmt: skip


@pytest.mark.parametrize(("module", "name"), NAMES)
def test_metadata_by_name(module: str, name: str, tmp_path: Path) -> None:
    for data in (by_name(module, name), by_name(module, name).replace(b"\x80\x04", b"\x80\x02")):
        (tmp_path / ".metadata").write_bytes(data)
        with pytest.raises(CheckpointError, match=rf"\.metadata refers to {module}\.{name}"):
            TorchDistSource(tmp_path)
        guard_checkpoint_reader()
        with pytest.raises(CheckpointError, match=rf"\.metadata refers to {module}\.{name}"):
            FileSystemReader(tmp_path).read_metadata()  # megatron-core's way


HOSTILE = {
    "empty": b"", "no pickle": b"{}", "cut short": pickle.dumps({"a": [1] * 99})[:-9], "another object": pickle.dumps(3),
    "memo of 16 GB": b"\x80\x02]r\xff\xff\xff\x7f.", "text of 16 GB": b"\x80\x04\x8d\xff\xff\xff\xff\x03\0\0\0a.",
    "frame of 16 GB": b"\x80\x04\x95\xff\xff\xff\xff\x03\0\0\0a.",
    "bytes of 16 GB": b"\x80\x05\x96\xff\xff\xff\xff\x03\0\0\0a.",
    "nested": b"\x80\x04" + b"(" * 200000 + b"t" * 200000 + b".",
    "stack empty": b"\x80\x04R.", "persistent": b"\x80\x04K\x01Q.", "number": b"I" + b"9" * 9999 + b"\n.",
    "unhashable": b"\x80\x04}]K\x01s.", "extension": b"\x80\x02\x82\x01.",
}  # fmt: skip


@pytest.mark.parametrize("what", HOSTILE)
def test_damaged_metadata_is_named(what: str, tmp_path: Path) -> None:
    (tmp_path / ".metadata").write_bytes(HOSTILE[what])
    with pytest.raises(CheckpointError, match=r"\.metadata"):
        TorchDistSource(tmp_path)


MEMO = b"r\xff\xff\xff\x7f"  # a place in the memo that the file chooses: 16 GB of it, in C


@pytest.mark.parametrize("behind", [b"]", b"\x8c\x02ab", b"\x8a\x02ab", b"K\x01", b"Jabcd", b"G12345678", b"\x8c\x01."])
def test_only_plain_pickles_are_read_in_c(behind: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """A damaged file reaches the reader in C through no length, number or text before the opcode that is not for it."""
    read = []
    for kind in ("_Fast", "_Careful"):
        monkeypatch.setattr(unpickle, kind, lambda file, kind=kind: read.append(kind))  # read no further
    for data in (behind + b".", behind + MEMO + b".", behind + MEMO.replace(b"\xff", b"."), behind, behind + b"..",
                 behind + b"\x96\xff\xff\xff\xff\x03\0\0\0.", behind + b"p9999999999\n."):  # fmt: skip
        with suppress(CheckpointError):
            read_metadata(io.BytesIO(b"\x80\x04" + data), ".metadata")
    assert read == ["_Fast"] + 6 * ["_Careful"]


def test_metadata_as_torch_writes_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also what a run's own checkpoints hold besides tensors: RNG states as objects."""
    save({"w": torch.ones(3, 2), "rng": {"random": (3, (1, 2), None), "torch": torch.get_rng_state()}},
         checkpoint_id=tmp_path, no_dist=True)  # fmt: skip
    monkeypatch.delattr(unpickle, "_Careful")  # the slow way is for other files
    with (tmp_path / ".metadata").open("rb") as file:
        assert set(read_metadata(file, tmp_path / ".metadata").state_dict_metadata) >= {"w"}
    guard_checkpoint_reader()
    state = {"w": torch.zeros(3, 2), "rng": {"random": None, "torch": torch.zeros_like(torch.get_rng_state())}}
    load(state, checkpoint_id=tmp_path, no_dist=True)
    assert state["w"].eq(1).all() and state["rng"]["random"] == (3, (1, 2), None)


def test_objects_in_distcp_files(tmp_path: Path) -> None:
    """rng_state of a foreign run directory."""
    save({"rng_state": Payload()}, checkpoint_id=tmp_path, no_dist=True)
    guard_checkpoint_reader()
    with pytest.raises(BaseException, match="(?i)weights.only|mkdir"):  # DCP's own exception is not an Exception
        load({"rng_state": io.BytesIO()}, checkpoint_id=tmp_path, no_dist=True)


def test_common_state(tmp_path: Path) -> None:
    for content in (Payload(), {"args": Payload()}, [1]):
        torch.save(content, tmp_path / "common.pt")
        with pytest.raises(CheckpointError, match=r"common\.pt"):
            load_common(tmp_path)
    (tmp_path / "common.pt").write_bytes(pickle.dumps(Payload()))
    with pytest.raises(CheckpointError, match=r"common\.pt cannot be read"):
        load_common(tmp_path)


@pytest.mark.parametrize("legacy", [False, True])
def test_every_library_loads_data_only(legacy: bool, tmp_path: Path) -> None:
    """optimizer.pt, scheduler.pt, rng_state.pth, training_args.bin, adapter_model.bin, pytorch_model.bin."""
    from peft.utils.save_and_load import load_peft_weights
    from transformers.modeling_utils import load_state_dict

    for name in ("adapter_model.bin", "pytorch_model.bin"):
        torch.save({"w": Payload()}, tmp_path / name, _use_new_zipfile_serialization=not legacy)
    only_data()
    for read in (
        lambda: load_peft_weights(str(tmp_path), device="cpu"),
        lambda: load_state_dict(str(tmp_path / "pytorch_model.bin")),
        lambda: torch.load(tmp_path / "pytorch_model.bin"),
        lambda: torch.load(tmp_path / "pytorch_model.bin", weights_only=False),
    ):
        with pytest.raises(Exception) as caught:  # noqa: B017 - each library has its own
            read()
        assert reason(caught.value).startswith("refers to posix.mkdir, which is code")


def test_a_librarys_own_words_hide_no_code(tmp_path: Path) -> None:
    """transformers 4 answers any failure with a word about TF 2.0 checkpoints, raised while it looks at the file again."""
    torch.save({"w": Payload()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(OSError) as caught:
        try:
            torch.load(tmp_path / "pytorch_model.bin", weights_only=True)
        except pickle.UnpicklingError:
            try:
                b"\xff".decode()
            except UnicodeDecodeError:
                raise OSError("Unable to load weights; please set from_tf=True")  # noqa: B904
    assert reason(caught.value).startswith("refers to posix.mkdir, which is code")
    assert reason(OSError("Unable\nto load")) == "Unable to load"
