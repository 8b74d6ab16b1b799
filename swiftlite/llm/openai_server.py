"""transformers' own server (`transformers serve`), and around it what OpenAI's clients expect of one and it lacks.

It keeps to one model, but lets clients load others and forget it, asks for no key, answers a bad request with 500, writes
the stop word at the end of an answer, no [DONE] after a stream, errors in another form, and goes on beyond the length that
the model holds (transformers 5.24). The rules below speak OpenAI's API alone, so they stand on nothing inside transformers
but `build_server`, which makes the app.
"""

from __future__ import annotations

import hmac
import importlib
import importlib.util
import json
import os
from collections.abc import Awaitable, Callable, Mapping, MutableMapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, cast

from swiftlite.llm.openai_requests import BadRequest, checked_request
from swiftlite.llm.stop_words import StopWords
from swiftlite.utils.errors import UsageError
from swiftlite.utils.types import Json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Event = MutableMapping[str, object]
Receive = Callable[[], Awaitable[Event]]
Send = Callable[[Event], Awaitable[None]]
App = Callable[[Event, Receive, Send], Awaitable[None]]

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
HEALTH = "/health"
_PATHS = (CHAT, COMPLETIONS, HEALTH, "/v1/models", "/v1/responses")


def check_installed() -> None:
    """Raises: UsageError if transformers has no server, or what it needs is missing."""
    import transformers

    if importlib.util.find_spec("transformers.cli.serving") is None:
        raise UsageError(
            f"--infer_backend transformers: transformers {transformers.__version__} has no server that serves one local "
            "model; pip install 'transformers>=5.17', or use --infer_backend vllm"
        )
    missing = [name for name in ("fastapi", "uvicorn", "openai") if importlib.util.find_spec(name) is None]
    if missing:
        raise UsageError(
            f"--infer_backend transformers: {', '.join(missing)} not installed; pip install 'swiftlite[serve]'"
        )


def serve(words: Sequence[str], directory: Path, key: str | None, longest: int | None) -> None:
    """Run `transformers serve NAME ...` in this process until it is ended.

    Args: words: as engines.transformers_words gives them. directory: where NAME is the model's path. key: that clients must
        give. longest: tokens of a conversation with its answer.
    """
    from transformers import AutoTokenizer
    from transformers.cli.transformers import app

    server = importlib.import_module("transformers.cli.serving.server")
    os.chdir(directory)
    tokenizer = AutoTokenizer.from_pretrained(words[2], trust_remote_code="--trust-remote-code" in words)
    build = server.build_server

    def build_server(*args: object, **keywords: object) -> object:
        made = build(*args, **keywords)
        made.add_middleware(OpenAiRules, key=key, tokenizer=tokenizer, longest=longest)
        return made

    setattr(server, "build_server", build_server)  # noqa: B010  # a module has no declared attributes
    app(list(words[1:]), prog_name="transformers")


class OpenAiRules:
    """ASGI around a server of one model: key, paths, bad requests, stop words."""

    def __init__(self, app: App, key: str | None, tokenizer: PreTrainedTokenizerBase, longest: int | None) -> None:
        self.app, self.key = app, key
        self.tokenizer, self.longest = tokenizer, longest

    async def __call__(self, scope: Event, receive: Receive, send: Send) -> None:
        path = str(scope.get("path"))
        if scope["type"] != "http":
            await self.app(scope, receive, send)
        elif path not in _PATHS:
            await _answer(send, 404, f"{path}: there is no such endpoint", "invalid_request_error")
        elif path != HEALTH and not self._knows(cast("Sequence[tuple[bytes, bytes]]", scope["headers"])):
            await _answer(send, 401, "the API key is missing or wrong", "authentication_error")
        elif path in (CHAT, COMPLETIONS) and scope["method"] == "POST":
            await self._generate(scope, receive, send, path == CHAT)
        else:
            await self.app(scope, receive, send)

    def _knows(self, headers: Sequence[tuple[bytes, bytes]]) -> bool:
        given = next((value for name, value in headers if name.lower() == b"authorization"), b"")
        return self.key is None or hmac.compare_digest(given, f"Bearer {self.key}".encode())

    async def _generate(self, scope: Event, receive: Receive, send: Send, chat: bool) -> None:
        try:
            request = checked_request(await _body(receive), chat, self.tokenizer, self.longest)
        except BadRequest as error:
            await _answer(send, 400, str(error), "invalid_request_error", error.param)
            return
        body, stop = json.dumps(request).encode(), request.get("stop")
        unread: list[Event] = [{"type": "http.request", "body": body, "more_body": False}]

        async def again() -> Event:
            return unread.pop() if unread else await receive()

        formed = Formed(send).send
        await self.app(scope, again, Cut(formed, stop, chat).send if stop else formed)


async def _body(receive: Receive) -> bytes:
    body, more = b"", True
    while more:
        event = await receive()
        body += cast(bytes, event.get("body", b""))
        more = bool(event.get("more_body"))
    return body


async def _answer(send: Send, status: int, message: str, kind: str, param: str | None = None) -> None:
    """An error in OpenAI's form."""
    error = {"message": message, "type": kind, "param": param, "code": None}
    body = json.dumps({"error": error}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


class Formed:
    """A response on its way out in OpenAI's form, which transformers' own lacks: errors as there, [DONE] after a stream."""

    def __init__(self, send: Send) -> None:
        self._send, self._status = send, 200
        self._streams, self._held = False, b""

    async def send(self, event: Event) -> None:
        body, more = cast(bytes, event.get("body", b"")), bool(event.get("more_body"))
        if event["type"] == "http.response.start":
            headers = dict(cast("Sequence[tuple[bytes, bytes]]", event["headers"]))
            self._status = cast(int, event["status"])
            self._streams = headers.get(b"content-type", b"").startswith(b"text/event-stream")
        elif self._status >= 400:
            self._held += body
            if not more:
                kind = "invalid_request_error" if self._status < 500 else "server_error"
                await _answer(self._send, self._status, _detail(self._held), kind)
        elif self._streams and not more and not self._held.endswith(b"data: [DONE]\n\n"):
            event = {**event, "body": body + b"data: [DONE]\n\n"}
        if self._status < 400:
            self._held = body or self._held
            await self._send(event)


def _detail(body: bytes) -> str:
    """What an error of FastAPI says."""
    text = body.decode(errors="replace")
    with suppress(ValueError):
        said = json.loads(text)
        text = str(said.get("detail", text)) if isinstance(said, Mapping) else text
    return text


class Cut:
    """A response on its way out, without the stop word that ends its text."""

    def __init__(self, send: Send, stop: Sequence[str], chat: bool) -> None:
        self._send, self.chat = send, chat
        self.words = StopWords(stop)
        self._start: Event = {}
        self._streams, self._held = False, b""

    async def send(self, event: Event) -> None:
        if event["type"] == "http.response.start":
            headers = dict(cast("Sequence[tuple[bytes, bytes]]", event["headers"]))
            self._streams = headers.get(b"content-type", b"").startswith(b"text/event-stream")
            self._start = event
            if self._streams:
                await self._send(event)
            return
        self._held += cast(bytes, event.get("body", b""))
        more = bool(event.get("more_body"))
        if self._streams:
            *whole, self._held = self._held.split(b"\n\n") if more else [*self._held.split(b"\n\n"), b""]
            body = b"".join(self._pieces(part) for part in whole if part)
            await self._send({"type": "http.response.body", "body": body, "more_body": more})
        elif not more:
            body = self._whole(self._held) if self._start["status"] == 200 else self._held
            others = cast("list[tuple[bytes, bytes]]", self._start["headers"])
            length = (b"content-length", str(len(body)).encode())
            await self._send({**self._start, "headers": [*(h for h in others if h[0] != b"content-length"), length]})
            await self._send({"type": "http.response.body", "body": body})

    def _whole(self, body: bytes) -> bytes:
        response: Json = json.loads(body)
        for choice in response.get("choices", ()):
            holder, name = (choice["message"], "content") if self.chat else (choice, "text")
            text = holder.get(name) or ""
            holder[name] = self.words.cut(text)
            if holder[name] != text:
                choice["finish_reason"] = "stop"
        return json.dumps(response).encode()

    def _pieces(self, event: bytes) -> bytes:
        """One event of a stream, or two where held text goes before its end, or none."""
        text = event.decode().removeprefix("data: ")
        if not event.startswith(b"data: {"):
            return event + b"\n\n"
        chunk: Json = json.loads(text)
        choice: Json = next(iter(chunk.get("choices", ())), {})
        if choice.get("finish_reason"):
            rest = self.words.rest()
            before = self._event({**chunk, "usage": None}, {**choice, "finish_reason": None}, rest) if rest else b""
            return before + event + b"\n\n"
        said = choice.get("delta", {}).get("content") if self.chat else choice.get("text")
        if not said:
            return event + b"\n\n"
        shown = self.words.feed(said)
        return self._event(chunk, choice, shown) if shown else b""

    def _event(self, chunk: Mapping[str, object], choice: Mapping[str, object], text: str) -> bytes:
        said = {"delta": {"content": text}} if self.chat else {"text": text}
        return b"data: " + json.dumps({**chunk, "choices": [{**choice, **said}]}).encode() + b"\n\n"
