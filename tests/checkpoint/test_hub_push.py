"""`--push_to_hub true` through the hubs' own clients, against a local server that keeps what it is sent."""

from __future__ import annotations

import base64
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
from typing import Any

import pytest

from swiftlite.checkpoint import hub
from swiftlite.utils.errors import UsageError
from tests.retries import NO_WAITING

FILES = {
    "config.json": b'{"architectures": ["Qwen3ForCausalLM"]}',
    "model.safetensors.index.json": b'{"weight_map": {}}',
    "model-00001-of-00002.safetensors": b"one" * 1000,
    "model-00002-of-00002.safetensors": b"two" * 1000,
    "tokenizer.json": b"{}",
    "modules.json": b"[]",  # an embedding model's
    "1_Pooling/config.json": b'{"pooling_mode_lasttoken": true}',
}


class _Hub(BaseHTTPRequestHandler):
    """Both hubs' uploads: LFS blobs by hash, commits of small files in base64. `broken`: hash whose upload fails."""

    protocol_version = "HTTP/1.1"
    blobs: dict[str, bytes] = {}
    repository: dict[str, bytes] = {}
    sent: list[str] = []
    commits: list[str] = []
    created: list[dict[str, Any]] = []
    broken: str | None = None

    def do_GET(self) -> None:
        self._reply({"Code": 200, "Success": True, "Data": {}, "id": "Org/Model", "sha": "a" * 40, "siblings": []})

    do_HEAD = do_GET

    def do_PUT(self) -> None:
        body = self._body()
        oid = self.path.rsplit("/", 1)[-1]
        if oid == self.broken:
            self._reply({"error": "not now"}, 403)  # what clients do not try again
            return
        assert hashlib.sha256(body).hexdigest() == oid
        self.blobs[oid] = body
        self.sent.append(oid)
        self._reply({"Code": 200, "Success": True, "Data": {}})

    def do_POST(self) -> None:
        path, body = urllib.parse.urlsplit(self.path).path, self._body()
        page = f"http://{self.headers['Host']}/Org/Model"
        if path.endswith("/info/lfs/objects/batch"):
            host, objects = self.headers["Host"], []
            for item in json.loads(body)["objects"]:
                new = item["oid"] not in self.blobs
                href = {"upload": {"href": f"http://{host}/blobs/{item['oid']}", "header": {}}}
                objects.append({**item, "actions": href} if new else item)
            answer = {"objects": objects, "transfer": "basic"}
            self._reply({**answer, "Code": 200, "Success": True, "Data": answer})
        elif "/preupload/" in path:
            files = [
                {"path": f["path"], "uploadMode": "lfs" if f["path"].endswith(".safetensors") else "regular",
                 "shouldIgnore": False} for f in json.loads(body)["files"]
            ]  # fmt: skip
            self._reply({"files": files})
        elif "/commit/" in path:
            self._commit(path, body)
            self._reply(
                {"Code": 200, "Success": True, "Data": {}, "commitUrl": f"{page}/commit/1", "commitOid": "b" * 40}
            )
        else:
            self.created.append(json.loads(body))
            self._reply({"Code": 200, "Success": True, "Data": {}, "url": page, "name": "Org/Model"})

    def _commit(self, path: str, body: bytes) -> None:
        if path.startswith("/api/v1/"):  # ModelScope
            for action in json.loads(body)["actions"]:
                lfs = action["type"] == "lfs"
                self._keep(action["path"], action["sha256"] if lfs else None, action.get("content"))
            return
        for line in map(json.loads, body.decode().splitlines()):
            if line["key"] != "header":
                value = line["value"]
                self._keep(value["path"], value.get("oid"), value.get("content"))

    def _keep(self, name: str, oid: str | None, content: str | None) -> None:
        self.repository[name] = self.blobs[oid] if oid else base64.b64decode(content or "")
        self.commits.append(name)

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        data = b""
        while size := int(self.rfile.readline(), 16):
            data += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return data

    def _reply(self, value: dict[str, Any], status: int = 200) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[str]:
    for kept in (_Hub.blobs, _Hub.repository, _Hub.sent, _Hub.commits, _Hub.created):
        kept.clear()
    _Hub.broken = None
    httpd = ThreadingHTTPServer(("127.0.0.1", 0), _Hub)
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{httpd.server_address[1]}"
    httpd.shutdown()
    httpd.server_close()


@pytest.fixture
def model(tmp_path: Path) -> Path:
    directory = tmp_path / "model"
    directory.mkdir()
    (directory / "1_Pooling").mkdir()
    for name, data in {**FILES, ".hidden": b"", "1_Pooling/notes.txt": b""}.items():
        (directory / name).write_bytes(data)
    return directory


def push(url: str, directory: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    """In a new process: both clients read the address of their hub when they are imported."""
    environment = {
        **os.environ, "HF_ENDPOINT": url, "HF_HOME": str(directory.parent / "hf"), "HF_HUB_DISABLE_XET": "1",
        "MODELSCOPE_ENDPOINT": url, "MODELSCOPE_DOMAIN": url, "MODELSCOPE_CACHE": str(directory.parent / "ms"),
        "PYTHONPATH": os.pathsep.join(sys.path),
    }  # fmt: skip
    code = f"{NO_WAITING}\nimport sys; from swiftlite.cli.main import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "export", "--model", str(directory), "--push_to_hub", "true"]
    command += ["--hub_model_id", "Org/Model", "--hub_token", "ms-12345678-1234-1234-1234-123456789012", *flags]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("use_hf", ["false", "true"])
def test_everything_arrives_and_an_interrupted_push_goes_on(server: str, model: Path, use_hf: str) -> None:
    second = hashlib.sha256(FILES["model-00002-of-00002.safetensors"]).hexdigest()
    _Hub.broken = second
    done = push(server, model, "--use_hf", use_hf, "--hub_private_repo", "true")
    assert done.returncode == 1, done.stderr
    assert "could not send model-00002-of-00002.safetensors in Org/Model" in done.stderr
    assert "config.json" not in _Hub.repository  # nobody can load half a model
    first = [oid for oid in _Hub.sent if oid != second]
    assert len(first) >= 1

    _Hub.broken = None
    done = push(server, model, "--use_hf", use_hf)
    assert done.returncode == 0, done.stderr
    assert _Hub.repository == FILES
    assert all(_Hub.sent.count(oid) == 1 for oid in _Hub.sent), "a file was sent again"
    assert _Hub.commits[-1] == "config.json"
    made = _Hub.created[0]
    # Hugging Face's word of today and of before, ModelScope's.
    assert made.get("visibility") == "private" or made.get("private") is True or made.get("Visibility") == 1, made


def test_the_id_is_checked_before_anything_is_done(model: Path) -> None:
    with pytest.raises(UsageError, match="must have the form ORGANISATION/NAME"):
        hub.push(model, "just-a-name")
