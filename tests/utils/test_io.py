"""Files and directories, and what the system says about this process."""

from __future__ import annotations

import subprocess
import sys

import pytest

from swiftlite.utils.io import peak_memory_bytes

CHILD = "from swiftlite.utils.io import peak_memory_bytes; x = bytearray(50 << 20); print(peak_memory_bytes())"


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_peak_memory_is_this_process_alone() -> None:
    ballast = bytearray(300 << 20)
    assert peak_memory_bytes() >= len(ballast)
    done = subprocess.run([sys.executable, "-c", CHILD], capture_output=True, text=True, check=True)
    assert 50 << 20 <= int(done.stdout) < 150 << 20  # getrusage would count the ballast
