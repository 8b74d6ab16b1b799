"""Files and directories that are either whole or absent."""

from __future__ import annotations

import errno
import glob
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from swiftlite.utils.errors import CheckpointError, SwiftliteError
from swiftlite.utils.logger import get_logger
from swiftlite.utils.types import Json


def replace_directory(source: Path, target: Path) -> None:
    """Let `source` take the name `target`, once all of its files are on the disk, with the modes that the umask gives.

    What was at `target` is moved aside, put back if the renaming fails, and deleted after the new one stands.
    """
    give_usual_modes(source)
    sync_tree(source)
    old = target.with_name(f".{target.name}.old-{os.getpid()}")
    moved = target.exists()
    if moved:
        target.rename(old)
    try:
        source.rename(target)
    except OSError:
        if moved:
            _put_back(old, target)
        raise
    sync_directory(target.parent)
    if moved:
        shutil.rmtree(old, ignore_errors=True)


def _put_back(old: Path, target: Path) -> None:
    try:
        old.rename(target)
    except OSError:
        get_logger().error("%s could not be put back; what it held is in %s", target, old)


def move_files(source: Path, target: Path) -> None:
    """Put the files of directory `source` into `target`, each one whole or not at all, and remove `source`."""
    give_usual_modes(source)
    sync_tree(source)
    for path in sorted(source.iterdir()):
        if path.is_dir():
            replace_directory(path, target / path.name)
        else:
            path.replace(target / path.name)
    sync_directory(target)
    source.rmdir()


def restore_directory(target: Path) -> None:
    """Finish what a `replace_directory(..., target)` that was killed left: put the old one back, or delete it.

    Only for whoever holds the lock of `target`.
    """
    for old in sorted(target.parent.glob(f".{glob.escape(target.name)}.old-*")):
        if target.exists():
            shutil.rmtree(old, ignore_errors=True)
        else:
            get_logger().warning("%s had been moved to %s by a process that was killed; put back", target, old)
            old.rename(target)


def give_usual_modes(directory: Path) -> None:
    """Let everything below `directory` be read and written as the umask says; some libraries write for the owner only."""
    umask = os.umask(0)
    os.umask(umask)
    for path in (directory, *directory.rglob("*")):
        if not path.is_symlink():
            mode = path.stat().st_mode & 0o7777
            usual = mode | (0o777 if path.is_dir() else 0o666) & ~umask
            if usual != mode:
                path.chmod(usual)


def sync_tree(directory: Path) -> None:
    """Force every file and folder below `directory` to the disk, and the directory itself last."""
    for folder, _, names in os.walk(directory, topdown=False):
        for name in names:
            path = os.path.join(folder, name)
            if not os.path.islink(path):
                sync_directory(path)
        sync_directory(folder)


def sync_directory(path: str | os.PathLike[str]) -> None:
    """Force a directory, or a file, to the disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        os.close(fd)


_hidden: set[Path] = set()


@contextmanager
def hidden(directory: Path) -> Iterator[None]:
    """Inside, what is written atomically below `directory` is not forced to the disk file by file.

    For a directory that nobody reads yet: `replace_directory` forces all of it to the disk before it gets its name.
    """
    _hidden.add(directory)
    try:
        yield
    finally:
        _hidden.discard(directory)


def write_text_atomic(path: Path, text: str) -> None:
    """Write next to `path` and rename, so that a reader sees the old text or the new one, also after the power failed.

    The latter outside of `hidden` directories only.
    """
    write_bytes_atomic(path, text.encode())


def write_bytes_atomic(path: Path, data: bytes) -> None:
    """See write_text_atomic."""
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    durable = _hidden.isdisjoint(path.parents)
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            if durable:
                os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(path)) from error
    if durable:
        sync_directory(path.parent)


def write_json(path: Path, value: object, default: Callable[[object], object] | None = None) -> None:
    """Write as JSON, see write_text_atomic. default: of json.dumps, for values that JSON does not have."""
    write_text_atomic(path, json.dumps(value, indent=2, ensure_ascii=False, default=default) + "\n")


MAX_JSON_BYTES = 256 << 20  # the index of a model of 100,000 tensors takes 10 MB, a tokenizer 40 MB


def read_json(path: Path, *, optional: bool = False) -> Json:
    """Read a side file that holds a JSON object. optional: {} where there is none.

    Raises: CheckpointError naming the file and what is wrong with it.
    """
    if optional and not path.is_file():
        return {}
    advice = "download or copy the file again"
    size = path.stat().st_size
    if size > MAX_JSON_BYTES:
        raise CheckpointError(f"{path} has {format_bytes(size)}, too much for a file of its kind; {advice}")
    try:
        value = json.loads(path.read_text(encoding="utf-8-sig"))
    except ValueError as error:  # also text that is not UTF-8
        raise CheckpointError(f"{path} is not valid JSON ({error}); {advice}") from None
    except RecursionError:
        raise CheckpointError(f"{path} is not valid JSON (nested too deeply); {advice}") from None
    except MemoryError:
        raise CheckpointError(f"{path} does not fit in memory; {advice}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a {type(value).__name__}, not a JSON object; {advice}")
    return value


_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
# What safetensors (Rust), torch.save (C++) and megatron-core make of it: text.
_FULL_TEXTS = ("No space left on device", "Disk quota exceeded", "File too large", "file write failed")


def _is_full(error: BaseException | None) -> bool:
    """Is a full disk, a quota or a limit on file sizes behind an error?"""
    while error is not None:
        if getattr(error, "errno", None) in _FULL or any(text in str(error) for text in _FULL_TEXTS):
            return True
        error = error.__cause__ or error.__context__
    return False


@contextmanager
def writing(directory: Path, way_on: str) -> Iterator[None]:
    """Around everything that writes below `directory`. Raises: CheckpointError, one line, where the disk is full."""
    try:
        yield
    except BaseException as error:  # torch's CheckpointException is not an Exception
        if not _is_full(error):
            raise
        free = format_bytes(shutil.disk_usage(existing_parent(directory)).free)
        file = getattr(error, "filename", None) or directory
        raise CheckpointError(
            f"{file} cannot be written: the disk is full, or a quota or limit is reached ({free} free in {directory}); "
            f"{way_on}"
        ) from error


def only_data() -> None:
    """From now on `torch.load` builds data only, whichever library calls it and however: checkpoints run no code."""
    os.environ.pop("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", None)
    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"


_MAX_NAME = 255  # bytes, of every usual file system


def plain_name(name: object, where: object, suffix: str = "") -> str:
    """`name` as a file says it, held to be that of a file next to it.

    Args: suffix: what it must end in, so that no other kind of file is read or written in its place.
    Raises: CheckpointError naming `where`.
    """
    if not isinstance(name, str) or not name or "\0" in name or name in (".", "..") or Path(name).name != name:
        raise CheckpointError(f"{where} points to {name!r}, outside the model directory; refusing to follow it")
    if not name.endswith(suffix) or len(name.encode("utf-8", "replace")) > _MAX_NAME:
        raise CheckpointError(
            f"{where} points to {name!r}; it must be a name{f' that ends in {suffix}' if suffix else ''} of at most "
            f"{_MAX_NAME} bytes; download or copy it again"
        )
    return name


def is_inside(path: Path, directory: Path) -> bool:
    """Is `path` a regular file of `directory`, links followed? The blobs of a hub's cache belong to its snapshots."""
    root = Path(os.path.realpath(directory))
    real = Path(os.path.realpath(path))
    roots = [root, root.parent.parent / "blobs"] if root.parent.name == "snapshots" else [root]
    return real.is_file() and any(real.is_relative_to(r) for r in roots)


@contextmanager
def blame(what: object) -> Iterator[None]:
    """Around code that takes values out of a file: where they are of another kind than expected, the error names it."""
    try:
        yield
    except SwiftliteError:
        raise
    except KeyError as error:
        raise CheckpointError(f"{what} does not say {error}; download or copy it again") from error
    except (
        TypeError, ValueError, AttributeError, IndexError, ArithmeticError, AssertionError, RecursionError, MemoryError
    ) as error:  # fmt: skip
        text = " ".join(str(error).split()) or type(error).__name__
        raise CheckpointError(f"{what} holds something unexpected ({text}); download or copy it again") from error


@dataclass(frozen=True)
class DiskSpeed:
    """Bytes per second, read from and written to the disk itself."""

    read: float
    write: float


def existing_parent(path: Path) -> Path:
    """`path`, or the nearest directory above it that exists."""
    return next(p for p in (path, *path.absolute().parents) if p.is_dir())


def probe_disk(directory: Path, seconds: float = 2.0) -> DiskSpeed | None:
    """Measure the disk that will hold `directory` with a temporary file, half the time writing, half reading.

    Returns: None where nothing can be written.
    """
    directory, block = existing_parent(directory), os.urandom(32 << 20)
    room = shutil.disk_usage(directory).free // 4
    buffer = bytearray(len(block))
    try:
        with tempfile.TemporaryFile(dir=directory, buffering=0) as file:
            written = read = 0
            started = time.perf_counter()
            while written <= room and (not written or time.perf_counter() - started < seconds / 2):
                written += sum(file.write(block) for _ in range(8))
                os.fdatasync(file.fileno())
            write_rate = written / (time.perf_counter() - started)
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            file.seek(0)
            started = time.perf_counter()
            while (count := file.readinto(buffer)) and time.perf_counter() - started < seconds / 2:
                read += count
            return DiskSpeed(max(read, count) / (time.perf_counter() - started), write_rate)
    except OSError:
        return None


def format_bytes(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.1f} {unit}" if unit != "B" else f"{count:.0f} B"
        count /= 1000
    return f"{count:.2f} TB"


def peak_memory_bytes() -> int:
    """Largest resident size that this process has had, or what getrusage says where there is no /proc.

    getrusage also counts what the parent held when it started this process.
    """
    try:
        status = Path("/proc/self/status").read_text()
        return next(int(line.split()[1]) << 10 for line in status.splitlines() if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak << 10


def available_memory_bytes() -> int:
    """Memory that programs can still have on this machine, page cache given up; a guess of 4 GB where it is not told."""
    try:
        meminfo = Path("/proc/meminfo").read_text()
        return next(int(line.split()[1]) << 10 for line in meminfo.splitlines() if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return 4 << 30
