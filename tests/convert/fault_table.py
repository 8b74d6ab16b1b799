"""What goes wrong with a conversion, what the user sees and what is left. Writes docs/faults.md:

    python -m tests.convert.fault_table > docs/faults.md

Each fault is caused on purpose; the command runs, the fault is fixed, the same command runs again, and the result must
be that of a run without a fault, byte for byte.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import io
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import tempfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from safetensors.torch import load_file, save_file

from swiftlite.checkpoint.bind import bind_map
from swiftlite.cli.main import main
from swiftlite.convert import conversion as convert
from swiftlite.weights import journal
from swiftlite.weights.safetensors import INDEX
from tests.conftest import TINY_CONFIGS

ONE, TWO = "model-1.safetensors", "model-2.safetensors"


@dataclass(frozen=True)
class Scene:
    """A folder with `hf`, a model in two shards, and `mcore`, its conversion; `out` is what the command writes."""

    root: Path
    to_hf: bool

    @property
    def out(self) -> Path:
        return self.root / "out"

    @property
    def source(self) -> Path:
        return self.root / ("mcore" if self.to_hf else "hf")

    def words(self, *flags: str) -> list[str]:
        direction = ["--mcore_model", str(self.source), "--to_hf", "true"] if self.to_hf else [
            "--model", str(self.source), "--model_type", "glm4_5", "--to_mcore", "true", "--thread_count", "2"]  # fmt: skip
        return ["export", *direction, "--output_dir", str(self.out), *flags]


Damage = Callable[[Scene], AbstractContextManager[Any]]


@dataclass(frozen=True)
class Case:
    """damage: enters the fault and fixes it when left. prelude: code that runs before the command, in a new process.

    after: a fault of what the command has written, seen by `swiftlite verify`.
    """

    name: str
    damage: Damage = lambda scene: contextlib.nullcontext()
    to_hf: bool = False
    flags: tuple[str, ...] = ()
    prelude: str | None = None
    after: bool = False


@dataclass(frozen=True)
class Seen:
    """message: the error line, paths shortened. left: what stands next to the source. again: how the next run resumed."""

    code: int
    message: str
    left: str
    again: str


# ---- damages ----


def edited(name: str, change: Callable[[bytes], bytes | None]) -> Damage:
    """A file of the source is changed, or removed where `change` gives None."""

    @contextmanager
    def damage(scene: Scene) -> Iterator[None]:
        path = next(scene.source.rglob(name))
        before, stat = path.read_bytes(), path.stat()
        after = change(before)
        path.unlink() if after is None else path.write_bytes(after)
        yield
        path.write_bytes(before)
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))

    return damage


def header(change: Callable[[dict[str, Any]], None]) -> Damage:
    """The JSON header of the second shard is changed."""

    def rewrite(data: bytes) -> bytes:
        length = int.from_bytes(data[:8], "little")
        parsed = json.loads(data[8 : 8 + length])
        change(parsed)
        text = json.dumps(parsed).encode()
        return len(text).to_bytes(8, "little") + text + data[8 + length :]

    return edited(TWO, rewrite)


def overlap(parsed: dict[str, Any]) -> None:
    """Two tensors share bytes: the third begins where the second does."""
    names = sorted((n for n in parsed if n != "__metadata__"), key=lambda n: parsed[n]["data_offsets"])
    start = parsed[names[1]]["data_offsets"][0]
    size = parsed[names[2]]["data_offsets"][1] - parsed[names[2]]["data_offsets"][0]
    parsed[names[2]]["data_offsets"] = [start, start + size]


def index(change: Callable[[dict[str, str]], None]) -> Damage:
    def rewrite(data: bytes) -> bytes:
        parsed = json.loads(data)
        change(parsed["weight_map"])
        return json.dumps(parsed).encode()

    return edited(INDEX, rewrite)


@contextmanager
def stored_twice(scene: Scene) -> Iterator[None]:
    one, two = (load_file(scene.source / name) for name in (ONE, TWO))
    original, stat = (scene.source / TWO).read_bytes(), (scene.source / TWO).stat()
    save_file({**two, "model.norm.weight": (one | two)["model.norm.weight"], next(iter(one)): one[next(iter(one))]},
              scene.source / TWO)  # fmt: skip
    yield
    (scene.source / TWO).write_bytes(original)
    os.utime(scene.source / TWO, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def failing(function: str, number: int, at: int) -> Damage:
    """The system call os.`function` fails from its `at`-th time on."""

    def damage(scene: Scene) -> AbstractContextManager[Any]:
        original, calls = getattr(os, function), []

        def call(*args: Any, **kwargs: Any) -> Any:
            calls.append(args)
            if len(calls) >= at:
                raise OSError(number, os.strerror(number))
            return original(*args, **kwargs)

        return mock.patch.object(os, function, call)

    return damage


def short_reads(scene: Scene) -> AbstractContextManager[Any]:
    original = os.preadv
    return mock.patch.object(os, "preadv", lambda fd, buffers, at: original(fd, [buffers[0][:999]], at))


@contextmanager
def read_only(scene: Scene) -> Iterator[None]:
    """As on a file system that is mounted read-only; root may write into any other directory."""
    original = os.mkdir

    def mkdir(path: Any, *args: Any, **kwargs: Any) -> None:
        if str(path).startswith(str(scene.root / ".out")):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
        original(path, *args, **kwargs)

    with mock.patch.object(os, "mkdir", mkdir):
        yield


@contextmanager
def locked(scene: Scene) -> Iterator[None]:
    path = scene.root / ".out.lock"
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
    path.unlink(missing_ok=True)


@contextmanager
def touched(scene: Scene) -> Iterator[None]:
    original = convert.run_jobs

    def run(*args: Any) -> Any:
        found = original(*args)
        os.utime(next(scene.source.glob("model-1*")))
        return found

    with mock.patch.object(convert, "run_jobs", run):
        yield


@contextmanager
def occupied(scene: Scene) -> Iterator[None]:
    scene.out.mkdir()
    (scene.out / "mine.txt").touch()
    yield
    shutil.rmtree(scene.out)


def little_room(scene: Scene) -> AbstractContextManager[Any]:
    return mock.patch("shutil.disk_usage", lambda path: mock.Mock(free=100_000))


class _Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return (os.system, ("true",))


def flipped(data: bytes) -> bytes:
    middle = len(data) - 5000
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


STOP_IN_WRITE = """
import os, signal
from swiftlite.weights.storage import Files
signal.signal(signal.SIGINT, signal.default_int_handler)  # what a shell starts in the background ignores it
original, left = Files.write, [20]
def write(self, *args):
    left[0] -= 1
    if left[0] == 0:
        os.kill(os.getpid(), signal.{signal})
        time.sleep(5)
    original(self, *args)
Files.write = write
"""
FILE_LIMIT = """
import resource
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
"""
Q = "model.layers.0.self_attn.q_proj.weight"
CASES = (
    Case("killed (SIGKILL, power)", prelude=STOP_IN_WRITE.format(signal="SIGKILL")),
    Case("killed on the way back", prelude=STOP_IN_WRITE.format(signal="SIGKILL"), to_hf=True),
    Case("Ctrl-C", prelude=STOP_IN_WRITE.format(signal="SIGINT")),
    Case("disk too small", little_room),
    Case("disk full while writing (ENOSPC)", failing("pwrite", errno.ENOSPC, 20)),
    Case("limit on file sizes (RLIMIT_FSIZE)", prelude=FILE_LIMIT),
    Case("disk error while reading (EIO)", failing("preadv", errno.EIO, 20)),
    Case("disk error while syncing", failing("fsync", errno.EIO, 3), to_hf=True),
    Case("reads that return less than asked for", short_reads),
    Case("output on a read-only file system", read_only),
    Case("another run writes the same output", locked),
    Case("output exists", occupied),
    Case("source changed during the run", touched),
    Case("--max_memory too small", flags=("--max_memory", "100"), to_hf=True),
    Case("shard missing", edited(TWO, lambda data: None)),
    Case("shard truncated", edited(TWO, lambda data: data[:-100])),
    Case("shard empty", edited(TWO, lambda data: b"")),
    Case("bit flipped in a header", edited(TWO, lambda data: data[:20] + bytes([data[20] ^ 128]) + data[21:])),
    Case("bit flipped in the written weights", edited(TWO, flipped), to_hf=True, after=True),
    Case("header longer than the format allows", edited(TWO, lambda data: (1 << 40).to_bytes(8, "little") + data[8:])),
    Case("offsets that overlap", header(overlap)),
    Case("tensor stored in two shards", stored_twice),
    Case("index names a tensor that is nowhere", index(lambda names: names.update(ghost=ONE))),
    Case("index names the wrong file", index(lambda names: names.update({Q: TWO if names[Q] == ONE else ONE}))),
    Case("index points outside (`../x`)", index(lambda names: names.update({Q: f"../{ONE}"}))),
    Case("index is not JSON", edited(INDEX, lambda data: data[:-10])),
    Case("tensor of the wrong shape", header(lambda h: h["model.norm.weight"].update(shape=[8, 8]))),
    Case("config.json is another model's",
         edited("config.json", lambda data: data.replace(b'"hidden_size": 64', b'"hidden_size": 32'))),
    Case("Megatron file missing", edited("__0_1.distcp", lambda data: None), to_hf=True),
    Case("Megatron file truncated", edited("__0_1.distcp", lambda data: data[: len(data) // 2]), to_hf=True),
    Case("Megatron metadata damaged", edited(".metadata", lambda data: data[: len(data) // 2]), to_hf=True),
    Case("Megatron metadata that would run code", edited(".metadata", lambda data: pickle.dumps(_Bomb())), to_hf=True),
    Case("tracker names an iteration that is not there",
         edited("latest_checkpointed_iteration.txt", lambda data: b"7"), to_hf=True),
)  # fmt: skip


# ---- running them ----


def tiny(directory: Path) -> Path:
    """A GLM-4.5-style model of 660 kB in one file, random weights."""
    directory.mkdir()
    config = TINY_CONFIGS["glm4_moe"]
    (directory / "config.json").write_text(json.dumps(config))
    bound = bind_map(config)
    tensors = {name: torch.randn(entry.hf_shapes[position]) for name, (entry, position) in bound.by_hf.items()}
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    return directory


def make_scene(root: Path, model: Path) -> None:
    """`root`/hf in two shards with an index, `root`/mcore, and the results of runs without a fault."""
    hf = root / "hf"
    shutil.copytree(model, hf)
    tensors = load_file(hf / "model.safetensors")
    (hf / "model.safetensors").unlink()
    names = sorted(tensors)
    halves = {ONE: names[: len(names) // 2], TWO: names[len(names) // 2 :]}
    for file, part in halves.items():
        save_file(OrderedDict((n, tensors[n]) for n in part), hf / file, {"format": "pt"})
    weight_map = {name: file for file, part in halves.items() for name in part}
    (hf / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    for to_hf, name in ((False, "mcore"), (True, "back")):
        scene = Scene(root, to_hf)
        assert run(scene.words(), None)[0] == 0
        scene.out.rename(root / name)


def run(words: list[str], prelude: str | None) -> tuple[int, str]:
    """(exit code, what went to stderr)."""
    if prelude is None:
        with contextlib.redirect_stderr(io.StringIO()) as errors, contextlib.redirect_stdout(io.StringIO()):
            code = main(words)
        return code, errors.getvalue()
    code = f"import sys, time\n{prelude}\nfrom swiftlite.cli.main import main\nsys.exit(main(sys.argv[1:]))"
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, timeout=120)
    return done.returncode if done.returncode >= 0 else 128 - done.returncode, done.stderr


def content(directory: Path) -> dict[str, bytes]:
    """Weights of a checkpoint, by file."""
    return {p.name: p.read_bytes() for p in directory.rglob("*") if p.suffix in (".safetensors", ".distcp")}


def observe(case: Case, root: Path) -> Seen:
    """Run the case. Raises: AssertionError if the run after it does not give what a run without a fault gives."""
    scene, wanted = Scene(root, case.to_hf), root / ("back" if case.to_hf else "mcore")
    if case.after:
        return _observe_written(case, scene)
    before = {p.name for p in root.iterdir()}
    journal_bytes = mock.patch.object(journal, "FLUSH_BYTES", 1)
    with journal_bytes, case.damage(scene):
        code, errors = run(scene.words(*case.flags), case.prelude)
        left = _left(scene, before)
        if code == 0:
            assert content(scene.out) == content(wanted)
            shutil.rmtree(scene.out)
            return Seen(code, "(nothing: it succeeds)", "the output", "")
    code_again, errors_again = run(scene.words(), None)
    assert code_again == 0, errors_again
    assert content(scene.out) == content(wanted), f"{case.name}: the run afterwards gives something else"
    assert {p.name for p in root.iterdir()} == before | {"out"}
    shutil.rmtree(scene.out)
    again = "resumes" if "resuming the unfinished" in errors_again else "starts anew"
    lines = [line for line in errors.splitlines() if line.startswith("swiftlite: ")]
    return Seen(code, _short(lines[-1] if lines else "(nothing)", root), left, again)


def _observe_written(case: Case, scene: Scene) -> Seen:
    assert run(scene.words(), None)[0] == 0
    written = Scene(scene.root / "written", False)
    written.root.mkdir()
    scene.out.rename(written.source)
    with case.damage(written):
        code, errors = run(["verify", str(scene.source), str(written.source)], None)
    assert run(["verify", str(scene.source), str(written.source)], None)[0] == 0
    shutil.rmtree(written.root)
    return Seen(code, "with `swiftlite verify`: " + _short(errors.splitlines()[-1], scene.root), "as it was", "")


def _left(scene: Scene, before: set[str]) -> str:
    found = {p.name for p in scene.root.iterdir()} - before - {".out.lock"}
    if not found:
        return "nothing"
    if found == {".out.partial"}:
        return "`.out.partial`"
    return "the output" if found == {"out"} and not (scene.out / "mine.txt").exists() else "what was there"


def _short(text: str, root: Path) -> str:
    """Without the folder, and without numbers of bytes that depend on releases and on which thread fails first."""
    text = re.sub(r"\d{4,}", "N", text.removeprefix("swiftlite: ").replace(f"{root}/", "")).strip()
    return re.sub(r"(model-|__0_)\d", r"\1N", text) if "[Errno" in text else text


def table() -> str:
    """The text of docs/faults.md."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder).resolve()
        make_scene(root, tiny(root / "tiny"))
        rows = [(case, observe(case, root)) for case in CASES]
    return document(rows)


def document(rows: list[tuple[Case, Seen]]) -> str:
    lines = [
        "# When a conversion goes wrong",
        "",
        "Written by `python -m tests.convert.fault_table` from runs with these faults; `make test-faults` fails if one",
        "ends otherwise. Whatever happens, the output's name stands for a whole checkpoint or for nothing. After each fault",
        "is fixed, the same command is given again, and its result is compared byte for byte with a run without one.",
        "`.out.partial` is the hidden sibling of the output `out` in which the work is; the same command resumes in it, or",
        "starts anew where there is nothing to resume from.",
        "",
        "| fault | command | what the user sees | exit code | left afterwards | the same command again |",
        "|---|---|---|---|---|---|",
    ]
    for case, seen in rows:
        direction = "`--to_hf`" if case.to_hf else "`--to_mcore`"
        lines.append(f"| {case.name} | {direction} | {seen.message.replace('|', chr(92) + '|')} | {seen.code} | "
                     f"{seen.left} | {seen.again} |")  # fmt: skip
    lines += [
        "",
        "Training: a checkpoint is written into a hidden sibling too, in the background with `--async_save true`, and the",
        "tracker file moves last. A run that is killed before that resumes from the checkpoint before (tests/dist).",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.stdout.write(table())
