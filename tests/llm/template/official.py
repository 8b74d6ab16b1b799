"""Official Jinja templates, rendered as transformers does, and random conversations to compare with."""

from __future__ import annotations

import json
import random
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

GOLDEN = Path(__file__).parents[2] / "golden" / "chat_templates"
MANIFEST = {entry["id"]: entry for entry in json.loads((GOLDEN / "manifest.json").read_text())["templates"]}
CONVERSATIONS: dict[str, dict[str, Any]] = json.loads((GOLDEN / "conversations.json").read_text())

# Official template -> the template type that writes it, where the names differ.
_TEMPLATE_TYPES = {
    "qwen2": "qwen",
    "llama3_1": "llama3_2",
    "internlm3": "internlm2",
    "yi__yi_chat": "chatml",
    "qwen3__rev1": "qwen3",
    "qwen3_instruct_2507": "qwen3_nothinking",
}
SMOLLM2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\n"
    "You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
IDS = [*MANIFEST, "smollm2"]


def template_type(official_id: str) -> str:
    return _TEMPLATE_TYPES.get(official_id, official_id)


def special_tokens(official_id: str) -> dict[str, str]:
    return MANIFEST[official_id]["special_tokens"] if official_id in MANIFEST else {"eos_token": "<|im_end|>"}


def jinja_text(official_id: str) -> str:
    return (GOLDEN / MANIFEST[official_id]["file"]).read_text() if official_id in MANIFEST else SMOLLM2


@cache
def _compiled(official_id: str) -> jinja2.Template:
    def raise_exception(message: str) -> None:
        raise jinja2.exceptions.TemplateError(message)

    def tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment.from_string(jinja_text(official_id))


def render(official_id: str, messages: list[Any], tools: Any, generation: bool, **kwargs: Any) -> str | None:
    """The official text, or None where the official template cannot write the conversation."""
    try:
        return _compiled(official_id).render(
            messages=messages,
            tools=tools,
            documents=None,
            add_generation_prompt=generation,
            **special_tokens(official_id),
            **kwargs,
        )
    except (jinja2.exceptions.TemplateError, TypeError, AttributeError):
        return None


_WORDS = (
    *(
        "",
        " ",
        "\n",
        "Hello",
        "  padded  ",
        "\nline\n\nline\n",
        "你好，世界",
        "🙂",
        "«é»",
        "{{x}}",
        "{% if %}",
        "<b>&'\"",
    ),
    *("</think>", "<think>", "<think>\nhm\n</think>\n\nyes", "<think></think>no", "a</think>b</think>c", "/nothink"),
    *("<tool_response>", "<tool_response>\nx\n</tool_response>", "<|im_end|>", "<|user|>", "\t\n x \n\t", "end\n\n"),
)
_TOOL = {
    "type": "function",
    "function": {"name": "f", "description": "Añade <b>", "parameters": {"type": "object", "properties": {}}},
}


def random_case(rng: random.Random) -> dict[str, Any]:
    """messages, tools, generation and options of one conversation; many are odd, some no template can write."""

    def text() -> str:
        return "".join(rng.choice(_WORDS) for _ in range(rng.choice((1, 1, 2, 3))))

    def content() -> Any:
        odd = rng.random()
        if odd < 0.03:
            return None
        if odd < 0.06:
            return [{"type": "text", "text": text()}, {"type": "text", "text": text()}]
        return text()

    def call() -> dict[str, Any]:
        arguments: Any = {"city": text(), "n": rng.choice((1, 2.5, True, None, [1, "é"], {"k": "v"}))}
        if rng.random() < 0.2:
            arguments = {}
        if rng.random() < 0.25:
            arguments = json.dumps(arguments)
        function = {"name": rng.choice(("f", "brave_search")), "arguments": arguments}
        return function if rng.random() < 0.1 else {"id": "1", "type": "function", "function": function}

    def assistant() -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": content()}
        if rng.random() < 0.3:
            message["reasoning_content"] = rng.choice((text(), "", "\n thought \n"))
        if rng.random() < 0.25:
            message["tool_calls"] = [call() for _ in range(rng.choice((1, 1, 1, 2, 3)))]
            if rng.random() < 0.4:
                message["content"] = rng.choice((None, ""))
        return message

    messages: list[dict[str, Any]] = []
    if rng.random() < 0.5:
        messages.append({"role": "system", "content": content()})
    if rng.random() < 0.6:
        for _ in range(rng.choice((0, 1, 2, 3))):
            messages.append({"role": "user", "content": content()})
            answer = assistant()
            messages.append(answer)
            if answer.get("tool_calls") and rng.random() < 0.9:
                messages += [{"role": "tool", "content": text(), "name": "f"} for _ in answer["tool_calls"]]
                if rng.random() < 0.7:
                    messages.append(assistant())
        if rng.random() < 0.6:
            messages.append({"role": "user", "content": content()})
    else:
        for _ in range(rng.choice((0, 1, 2, 4, 6))):
            role = rng.choice(("user", "user", "assistant", "assistant", "tool", "system", "developer"))
            messages.append(assistant() if role == "assistant" else {"role": role, "content": content()})

    options: dict[str, Any] = {}
    if rng.random() < 0.5:
        options["enable_thinking"] = rng.random() < 0.5
    if rng.random() < 0.3:
        options["date_string"] = rng.choice(("01 Jan 2030", "26 Jul 2024"))
    if rng.random() < 0.1:
        options["tools_in_user_message"] = False
    if rng.random() < 0.1:
        options["builtin_tools"] = ["brave_search", "code_interpreter"]
    tools = rng.choice((None, None, [], [_TOOL], [_TOOL, {"name": "g", "x": "ü"}]))
    return {"messages": messages, "tools": tools, "generation": rng.random() < 0.5, "options": options}
