"""Downloads through the hubs' own clients, against a local server that speaks just enough of both protocols."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
import urllib.parse
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from swiftlite.checkpoint import hub
from swiftlite.utils.errors import UsageError
from tests.retries import NO_WAITING

FILES = {
    "config.json": json.dumps({"architectures": ["Glm4MoeForCausalLM"], "vocab_size": 320}).encode(),
    "tokenizer_config.json": b"{}",
    "model.safetensors": b"\x08\x00\x00\x00\x00\x00\x00\x00{}      ",
    "pytorch_model.pth": b"not for transformers",
}
COMMIT = "a" * 40


class _Hub(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    served: list[str] = []

    def do_GET(self) -> None:
        url = urllib.parse.urlsplit(self.path)
        query = dict(urllib.parse.parse_qsl(url.query))
        if url.path == "/api/models/Org/Model/revision/main":
            files = [{"rfilename": name, "size": len(data)} for name, data in FILES.items()]
            self._reply(json.dumps({"id": "Org/Model", "sha": COMMIT, "siblings": files}).encode())
        elif url.path == f"/api/models/Org/Model/tree/{COMMIT}":
            entries = [{"type": "file", "path": n, "size": len(d), "oid": COMMIT} for n, d in FILES.items()]
            self._reply(json.dumps(entries).encode())
        elif url.path == "/api/v1/models/Org/Model/repo/files":
            files = [
                {"Name": n, "Path": n, "Type": "blob", "Size": len(d), "Sha256": hashlib.sha256(d).hexdigest()}
                for n, d in FILES.items()
            ]
            self._reply(json.dumps({"Code": 200, "Success": True, "Data": {"Files": files}}).encode())
        else:
            name = query.get("FilePath") or url.path.rsplit("/", 1)[-1]
            found = FILES.get(name) if "/resolve/" in url.path or "FilePath" in query else None
            if found is not None and self.command == "GET":
                self.served.append(name)
            self._reply(found)

    do_HEAD = do_GET

    def _reply(self, body: bytes | None) -> None:
        self.send_response(404 if body is None else 200)
        body = body or b""
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Content-Type", "application/json")
        self.send_header("ETag", f'"{hashlib.sha256(body).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[str]:
    _Hub.served.clear()
    httpd = ThreadingHTTPServer(("127.0.0.1", 0), _Hub)
    thread = threading.Thread(target=httpd.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{httpd.server_address[1]}"
    httpd.shutdown()
    httpd.server_close()


def _fetch(url: str, cache: Path, model_id: str, **kwargs: object) -> subprocess.CompletedProcess[str]:
    """Run hub.fetch in a new process: both clients read the address of their hub when they are imported."""
    environment = {
        **os.environ,
        "HF_ENDPOINT": url,
        "HF_HOME": str(cache / "hf"),
        "MODELSCOPE_ENDPOINT": url,
        "MODELSCOPE_DOMAIN": url,
        "MODELSCOPE_CACHE": str(cache / "ms"),
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    code = f"{NO_WAITING}\nfrom swiftlite.checkpoint import hub; print(hub.fetch({model_id!r}, **{kwargs!r}))"
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("use_hf", [False, True])
def test_downloads_what_is_needed_and_no_more(server: str, tmp_path: Path, use_hf: bool) -> None:
    done = _fetch(server, tmp_path, "Org/Model", use_hf=use_hf, download_model=False)
    assert done.returncode == 0, done.stderr
    directory = Path(done.stdout.strip().splitlines()[-1])
    assert (directory / "config.json").read_bytes() == FILES["config.json"]
    assert sorted(set(_Hub.served)) == ["config.json", "tokenizer_config.json"]

    done = _fetch(server, tmp_path, "Org/Model", use_hf=use_hf, download_model=True)
    assert done.returncode == 0, done.stderr
    assert (directory / "model.safetensors").read_bytes() == FILES["model.safetensors"]
    assert "pytorch_model.pth" not in _Hub.served
    assert hub.model_name(str(directory)) == "model"


@pytest.mark.parametrize("use_hf", [False, True])
def test_without_network_the_cached_copy_is_used(server: str, tmp_path: Path, use_hf: bool) -> None:
    assert _fetch(server, tmp_path, "Org/Model", use_hf=use_hf, download_model=False).returncode == 0
    nowhere = "http://127.0.0.1:9"
    again = _fetch(nowhere, tmp_path, "Org/Model", use_hf=use_hf, download_model=False)
    assert again.returncode == 0, again.stderr
    assert Path(again.stdout.strip().splitlines()[-1], "config.json").read_bytes() == FILES["config.json"]
    weights = _fetch(nowhere, tmp_path, "Org/Model", use_hf=use_hf, download_model=True)
    assert weights.returncode != 0  # the cache holds no weights
    assert "could not download Org/Model from" in weights.stderr
    assert "or give a local directory" in weights.stderr


def test_paths_that_are_no_model(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such directory"):
        hub.fetch(str(tmp_path / "absent"))
    file = tmp_path / "config.json"
    file.write_text("{}")
    with pytest.raises(UsageError, match="is a file"):
        hub.fetch(str(file))
    assert hub.fetch(str(tmp_path)) == str(tmp_path)


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("ZhipuAI/GLM-4.5-Air", "glm-4.5-air"),
        ("/cache/hub/models/ZhipuAI/GLM-4___5-Air/", "glm-4.5-air"),
        ("/cache/hub/models/ZhipuAI--GLM-4.5-Air/snapshots/master", "glm-4.5-air"),
        ("/cache/models--zai-org--GLM-4.5-Air/snapshots/0123abc", "glm-4.5-air"),
        ("/cache/models--zai-org--GLM-4.5-Air/snapshots/0123abc/", "glm-4.5-air"),
    ],
)
def test_names_of_cache_paths(path: str, name: str) -> None:
    assert hub.model_name(path) == name


def test_record_patterns_become_shell_patterns() -> None:
    assert hub._glob(r".+\.bin$") == "*.bin"
    assert hub._glob("*.gguf") == "*.gguf"
