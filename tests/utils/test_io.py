"""Files and directories, and what the system says about this process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from swiftlite.utils.io import hidden, move_files, peak_memory_bytes, replace_directory, write_text_atomic

CHILD = "from swiftlite.utils.io import peak_memory_bytes; x = bytearray(50 << 20); print(peak_memory_bytes())"


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_peak_memory_is_this_process_alone() -> None:
    ballast = bytearray(300 << 20)
    assert peak_memory_bytes() >= len(ballast)
    done = subprocess.run([sys.executable, "-c", CHILD], capture_output=True, text=True, check=True)
    assert 50 << 20 <= int(done.stdout) < 150 << 20  # getrusage would count the ballast


def test_finished_directories_have_the_usual_modes(tmp_path: Path) -> None:
    """safetensors and tempfile write for the owner only; the umask decides what others may do."""
    made = tmp_path / "made"
    (made / "inner").mkdir(parents=True, mode=0o700)
    for name, mode in (("a", 0o600), ("inner/b", 0o600), ("c", 0o755)):
        (made / name).touch()
        (made / name).chmod(mode)
    before = os.umask(0o027)
    try:
        replace_directory(made, tmp_path / "there")
    finally:
        os.umask(before)
    modes = {name: (tmp_path / "there" / name).stat().st_mode & 0o777 for name in ("a", "inner/b", "inner", "c")}
    assert modes == {"a": 0o640, "inner/b": 0o640, "inner": 0o750, "c": 0o755}


def test_files_are_moved_whole_and_others_stay(tmp_path: Path, syncs: Any) -> None:
    made, there = tmp_path / ".made", tmp_path / "there"
    made.mkdir()
    there.mkdir()
    for name in ("a", "b"):
        (made / name).write_text("new")
    (there / "a").write_text("old")
    (there / "mine").write_text("mine")
    seen = os.open(there / "a", os.O_RDONLY)
    move_files(made, there)
    assert {p.name: p.read_text() for p in there.iterdir()} == {"a": "new", "b": "new", "mine": "mine"}
    assert os.read(seen, 9) == b"old" and not made.exists()  # who had opened the old file reads all of it
    os.close(seen)
    assert syncs.unsynced(there / "a") == []


def test_small_files_reach_the_disk_before_their_name_or_that_of_their_directory(tmp_path: Path, syncs: Any) -> None:
    made, beside = tmp_path / ".made", tmp_path / ".made-2"
    for directory in (made, beside):
        (directory / "inner").mkdir(parents=True)
    with hidden(made):
        write_text_atomic(made / "inner" / "a", "text")
        write_text_atomic(beside / "inner" / "a", "text")
    assert len(syncs.unsynced(made / "inner" / "a")) == 1  # left to replace_directory
    assert syncs.unsynced(beside / "inner" / "a") == []
    replace_directory(made, tmp_path / "there")
    assert syncs.unsynced(tmp_path / "there") == []
    write_text_atomic(made, "text")
    assert syncs.unsynced(made) == []
