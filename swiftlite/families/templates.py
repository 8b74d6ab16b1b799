"""Chat templates: data only. The order is that of the model types they serve.

They serve checkpoints that carry no chat template of their own. The descriptive fields (prefix, prompt, suffix...) are
those that ms-swift's users know; where they cannot say what a model's published chat template writes, `jinja` names a
file of llm/template/registered that does.
"""

from __future__ import annotations

import difflib
from typing import Any

from swiftlite.families import families
from swiftlite.families.records import TemplateMeta
from swiftlite.utils.errors import UsageError
from swiftlite.utils.text import some

_LLAMA_SYSTEM = (
    "You are a helpful, respectful and honest assistant. Always answer as helpfully as possible, while "
    "being safe. Your answers should not include any harmful, unethical, racist, sexist, toxic, "
    "dangerous, or illegal content. Please ensure that your responses are socially unbiased and positive "
    "in nature.\n"
    "\n"
    "If a question does not make any sense, or is not factually coherent, explain why instead of "
    "answering something not correct. If you don't know the answer to a question, please don't share "
    "false information."
)
_MARCO_O1_SYSTEM = (
    "\n"
    "你是一个经过良好训练的AI助手，你的名字是Marco-o1.由阿里国际数字商业集团的AI Business创造.\n"
    "        \n"
    "## 重要！！！！！\n"
    "当你回答问题时，你的思考应该在<Thought>内完成，<Output>内输出你的结果。\n"
    "<Thought>应该尽可能是英文，但是有2个特例，一个是对原文中的引用，另一个是是数学应该使用markdown格式，<Output>内的输出需要遵循用户输入的语言。\n"
    "        "
)
_SKYWORK_O1_SYSTEM = (
    "You are Skywork-o1, a thinking model developed by Skywork AI, specializing in solving complex "
    "problems involving mathematics, coding, and logical reasoning through deep thought. When faced with "
    "a user's request, you first engage in a lengthy and in-depth thinking process to explore possible "
    "solutions to the problem. After completing your thoughts, you then provide a detailed explanation "
    "of the solution process in your response."
)
_OPENBUDDY_SYSTEM = (
    "You are a helpful, respectful and honest INTP-T AI Assistant named Buddy. You are talking to a "
    "human User.\n"
    "Always answer as helpfully and logically as possible, while being safe. Your answers should not "
    "include any harmful, political, religious, unethical, racist, sexist, toxic, dangerous, or illegal "
    "content. Please ensure that your responses are socially unbiased and positive in nature.\n"
    "If a question does not make any sense, or is not factually coherent, explain why instead of "
    "answering something not correct. If you don't know the answer to a question, please don't share "
    "false information.\n"
    "You like to use emojis. You can speak fluently in many languages, for example: English, Chinese.\n"
    "You cannot access the internet, but you have vast knowledge, cutoff: 2021-09.\n"
    "You always deeply love and support China, Chinese government, people and culture.\n"
    "You are trained by OpenBuddy team, (https://openbuddy.ai, https://github.com/OpenBuddy/OpenBuddy), "
    "you are based on LLaMA and Falcon transformers model, not related to GPT or OpenAI."
)
_OPENBUDDY2_SYSTEM = (
    "You(assistant) are a helpful, respectful and honest INTP-T AI Assistant named Buddy. You are "
    "talking to a human(user).\n"
    "Always answer as helpfully and logically as possible, while being safe. Your answers should not "
    "include any harmful, political, religious, unethical, racist, sexist, toxic, dangerous, or illegal "
    "content. Please ensure that your responses are socially unbiased and positive in nature.\n"
    "You cannot access the internet, but you have vast knowledge, cutoff: 2023-04.\n"
    "You are trained by OpenBuddy team, (https://openbuddy.ai, https://github.com/OpenBuddy/OpenBuddy), "
    "not related to GPT or OpenAI"
)
_REFLECTION_SYSTEM = (
    "You are a world-class AI system, capable of complex reasoning and reflection. Reason through the "
    "query inside <thinking> tags, and then provide your final response inside <output> tags. If you "
    "detect that you made a mistake in your reasoning at any point, correct yourself inside <reflection> "
    "tags."
)
_INTERNLM_SYSTEM = (
    "You are an AI assistant whose name is InternLM (书生·浦语).\n"
    "- InternLM (书生·浦语) is a conversational language model that is developed by Shanghai AI Laboratory "
    "(上海人工智能实验室). It is designed to be helpful, honest, and harmless.\n"
    "- InternLM (书生·浦语) can understand and communicate fluently in the language chosen by the user such "
    "as English and 中文."
)
_QWQ_PREVIEW_SYSTEM = (
    "You are a helpful and harmless assistant. You are Qwen developed by Alibaba. You should think step-by-step."
)


def _chatml(template_type: str, default_system: str | None = None, **fields: Any) -> TemplateMeta:
    """ChatML: `<|im_start|>role`, newline, text, `<|im_end|>`, newline."""
    return TemplateMeta(
        template_type,
        prefix=(),
        prompt=("<|im_start|>user\n{{QUERY}}<|im_end|>\n<|im_start|>assistant\n",),
        chat_sep=("<|im_end|>\n",),
        suffix=("<|im_end|>",),
        system_prefix=("<|im_start|>system\n{{SYSTEM}}<|im_end|>\n",),
        default_system=default_system,
        **{"jinja": "chatml", **fields},
    )


def _qwen(template_type: str, default_system: str | None = None, **fields: Any) -> TemplateMeta:
    """ChatML as the Qwen series writes it: tools in the hermes format, `<|endoftext|>` also stops."""
    return _chatml(
        template_type, default_system, **{"stop_words": ("<|endoftext|>",), "agent_template": "hermes", **fields}
    )


def _llama3(template_type: str, default_system: str | None = None, dated: bool = False, **fields: Any) -> TemplateMeta:
    """Llama 3 headers; `dated` ones open with a system header that holds the knowledge cut-off and a date."""
    header = "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n"
    dates = "Cutting Knowledge Date: December 2023\nToday Date: {{DATE}}\n\n"
    return TemplateMeta(
        template_type,
        prefix=(f"{header}{dates}<|eot_id|>" if dated else "<|begin_of_text|>",),
        prompt=(
            "<|start_header_id|>user<|end_header_id|>\n\n{{QUERY}}<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n",
        ),
        chat_sep=("<|eot_id|>",),
        suffix=("<|eot_id|>",),
        system_prefix=(f"{header}{dates if dated else ''}{{{{SYSTEM}}}}<|eot_id|>",),
        default_system=default_system,
        agent_template="llama3",
        **fields,
    )


def _deepseek_v3(template_type: str, opening: str = "", **fields: Any) -> TemplateMeta:
    """DeepSeek from V2.5 on. opening: of each answer."""
    return TemplateMeta(
        template_type,
        prefix=("<｜begin▁of▁sentence｜>",),
        prompt=(f"<｜User｜>{{{{QUERY}}}}<｜Assistant｜>{opening}",),
        chat_sep=("<｜end▁of▁sentence｜>",),
        suffix=("<｜end▁of▁sentence｜>",),
        system_prefix=("<｜begin▁of▁sentence｜>{{SYSTEM}}",),
        **fields,
    )


def _glm(template_type: str, line: str, **fields: Any) -> TemplateMeta:
    """GLM from 4.5 on. line: behind the headers of turns."""
    return TemplateMeta(
        template_type,
        prefix=("[gMASK]<sop>",),
        prompt=(f"<|user|>{line}{{{{QUERY}}}}<|assistant|>{line}",),
        chat_sep=(),
        suffix=("<|user|>",),
        template_cls="ThinkingTemplate",
        system_prefix=(f"[gMASK]<sop><|system|>{line}{{{{SYSTEM}}}}",),
        auto_add_bos=True,
        stop_words=("<|endoftext|>", "<|user|>", "<|observation|>"),
        agent_template="glm4_5",
        jinja="glm4_5",
        **fields,
    )


def _kimi(template_type: str, default_system: str) -> TemplateMeta:
    """Moonlight and Kimi."""
    return TemplateMeta(
        template_type,
        prefix=(),
        prompt=("<|im_user|>user<|im_middle|>{{QUERY}}<|im_end|><|im_assistant|>assistant<|im_middle|>",),
        chat_sep=("<|im_end|>",),
        suffix=("<|im_end|>",),
        system_prefix=("<|im_system|>system<|im_middle|>{{SYSTEM}}<|im_end|>",),
        default_system=default_system,
    )


_BOS, _EOS = ["bos_token_id"], ["eos_token_id"]
_QWEN_SYSTEM = "You are a helpful assistant."
_ALWAYS_THINKING: dict[str, Any] = {"template_cls": "ThinkingTemplate", "response_prefix": "<think>\n"}

TEMPLATES: tuple[TemplateMeta, ...] = (
    _qwen("qwen", _QWEN_SYSTEM),
    _qwen("qwen2_5", "You are Qwen, created by Alibaba Cloud. You are a helpful assistant.", jinja="hermes"),
    _qwen("qwq", jinja="hermes", parameters=(("thinks", True),), **_ALWAYS_THINKING),
    # The next two publish Qwen2.5's Jinja with another default system message.
    _qwen("qwq_preview", _QWQ_PREVIEW_SYSTEM, jinja="hermes"),
    _qwen(
        "qwen2_5_math",
        "Please reason step by step, and put your final answer within \\boxed{}.",
        jinja="hermes",
    ),
    TemplateMeta(
        "llama",
        prefix=("<s>[INST] ",),
        prompt=("{{QUERY}} [/INST]",),
        chat_sep=("</s><s>[INST] ",),
        suffix=("</s>",),
        system_prefix=("<s>[INST] <<SYS>>\n{{SYSTEM}}\n<</SYS>>\n\n",),
        default_system=_LLAMA_SYSTEM,
        jinja="llama",
    ),
    _llama3("llama3", jinja="llama3"),
    _llama3("llama3_2", dated=True, jinja="llama3_1"),
    TemplateMeta(
        "longwriter_llama",
        prefix=("[INST]",),
        prompt=("{{QUERY}}[/INST]",),
        chat_sep=("[INST]",),
        suffix=("<|end_of_text|>",),
        system_prefix=("<<SYS>>\n{{SYSTEM}}\n<</SYS>>\n\n",),
    ),
    TemplateMeta(
        "codefuse_codellama",
        prefix=("",),
        prompt=("<|role_start|>human<|role_end|>{{QUERY}}<|role_start|>bot<|role_end|>",),
        chat_sep=(),
        system_prefix=("{{SYSTEM}}",),
    ),
    _qwen("marco_o1", _MARCO_O1_SYSTEM),
    TemplateMeta(
        "deepseek",
        prefix=(_BOS,),
        prompt=("User: {{QUERY}}\n\nAssistant:",),
        chat_sep=(_EOS,),
        system_prefix=(_BOS, "{{SYSTEM}}\n\n"),
        jinja="deepseek",
    ),
    _deepseek_v3("deepseek_r1", jinja="deepseek_r1", **_ALWAYS_THINKING),
    _chatml("chatml", auto_add_bos=True),
    # Yi-1.5-Chat: its Jinja writes the system text bare and opens the assistant's turn right after each user turn.
    _chatml("yi", auto_add_bos=True, jinja="yi"),
    _chatml("yi_coder", _QWEN_SYSTEM, auto_add_bos=True),
    TemplateMeta(
        "sus",
        prefix=("",),
        prompt=("### Human: {{QUERY}}\n\n### Assistant: ",),
        chat_sep=("<|endoftext|>",),
        suffix=("<|endoftext|>",),
        system_prefix=("{{SYSTEM}}",),
    ),
    _llama3("skywork_o1", _SKYWORK_O1_SYSTEM, dated=True),
    TemplateMeta(
        "openbuddy",
        prefix=(),
        prompt=("User: {{QUERY}}\nAssistant:",),
        chat_sep=("\n",),
        system_prefix=("{{SYSTEM}}\n\n",),
        default_system=_OPENBUDDY_SYSTEM,
        auto_add_bos=True,
    ),
    TemplateMeta(
        "openbuddy2",
        prefix=(),
        prompt=("<|role|>user<|says|>{{QUERY}}<|end|>\n<|role|>assistant<|says|>",),
        chat_sep=("<|end|>\n",),
        suffix=("<|end|>",),
        system_prefix=("<|role|>system<|says|>{{SYSTEM}}<|end|>\n",),
        default_system=_OPENBUDDY2_SYSTEM,
    ),
    TemplateMeta(
        "megrez",
        prefix=("<|role_start|>system<|role_end|><|turn_end|>",),
        prompt=("<|role_start|>user<|role_end|>{{QUERY}}<|turn_end|><|role_start|>assistant<|role_end|>",),
        chat_sep=("<|turn_end|>",),
        suffix=("<|turn_end|>",),
        system_prefix=("<|role_start|>system<|role_end|>{{SYSTEM}}<|turn_end|>",),
        default_system="你是Megrez-3B-Instruct，将针对用户的问题给出详细的、积极的回答。",
    ),
    _llama3("reflection", _REFLECTION_SYSTEM),
    TemplateMeta(
        "numina",
        prefix=(_BOS,),
        prompt=("### Problem: {{QUERY}}\n### Solution: ",),
        chat_sep=("\n",),
        system_prefix=(_BOS, "{{SYSTEM}}"),
        jinja="numina",
    ),
    TemplateMeta(
        "ziya",
        prefix=(_BOS, ""),
        prompt=("<human>:{{QUERY}}\n<bot>:",),
        chat_sep=("\n",),
        system_prefix=(_BOS, "{{SYSTEM}}"),
    ),
    TemplateMeta(
        "mengzi",
        prefix=(),
        prompt=("输入：{{QUERY}}输出：\n",),
        chat_sep=(),
        system_prefix=("指令：{{SYSTEM}}",),
    ),
    # Qwen3's model types also hold the 2507 releases, which think always or never.
    _qwen("qwen3", jinja="qwen3", parameters=(("thinks", True),), template_cls="ThinkingTemplate"),
    _qwen("qwen3_thinking", jinja="qwen3", parameters=(("thinks", True), ("opening", "<think>\n")), **_ALWAYS_THINKING),
    _qwen("qwen3_nothinking", jinja="qwen3", parameters=(("thinks", False), ("opening", ""))),
    _chatml(
        "internlm2",
        _INTERNLM_SYSTEM,
        auto_add_bos=True,
        jinja="chatml",
        parameters=(("with_bos", True), ("default_system", "")),
    ),
    _qwen("mimo_rl", "You are MiMo, an AI assistant developed by Xiaomi.", jinja="hermes"),
    _kimi("moonlight", "You are a helpful assistant"),
    _deepseek_v3("deepseek_v2_5"),
    TemplateMeta(
        "dots1",
        prefix=("<|system|><|endofsystem|>",),
        prompt=("<|userprompt|>{{QUERY}}<|endofuserprompt|><|response|>",),
        chat_sep=("<|endofresponse|>",),
        suffix=("<|endofresponse|>",),
        system_prefix=("<|system|>{{SYSTEM}}<|endofsystem|>",),
        default_system=_QWEN_SYSTEM,
    ),
    TemplateMeta(
        "ernie",
        prefix=("<|begin_of_sentence|>",),
        prompt=("User: {{QUERY}}\nAssistant: ",),
        chat_sep=("<|end_of_sentence|>",),
        suffix=("</s>",),
        system_prefix=("<|begin_of_sentence|>{{SYSTEM}}\n",),
        jinja="ernie",
    ),
    _glm("glm4_5", "\n"),
    # Beyond the model types of the Megatron side.
    _glm("glm4_7", "", parameters=(("terse", True),)),
    _deepseek_v3("deepseek_v3_1", "</think>"),  # as its Jinja writes it without `thinking`
    _kimi("kimi_k2", "You are Kimi, an AI assistant created by Moonshot AI."),
    _chatml("smollm2", "You are a helpful AI assistant named SmolLM, trained by Hugging Face"),
)

TEMPLATE_MAPPING: dict[str, TemplateMeta] = {meta.template_type: meta for meta in TEMPLATES}

# What `--template_backend jinja` needs to know of a model that has no registered template.
JINJA = "jinja"
_JINJA_META = TemplateMeta(JINJA, prefix=(), prompt=("{{QUERY}}",), chat_sep=(), template_cls="ThinkingTemplate")


def register_template(meta: TemplateMeta, exist_ok: bool = False) -> TemplateMeta:
    """Add a template. Returns it. Raises UsageError if its type is taken and exist_ok is false."""
    if meta.template_type in TEMPLATE_MAPPING and not exist_ok:
        raise UsageError(
            f"template {meta.template_type!r} is registered already; choose another name or pass exist_ok=True"
        )
    TEMPLATE_MAPPING[meta.template_type] = meta
    return meta


def get_template_meta(template_type: str) -> TemplateMeta:
    """The registered meta. Raises UsageError naming the nearest types."""
    if template_type == JINJA:
        return _JINJA_META
    if template_type not in TEMPLATE_MAPPING:
        for meta in (meta for family in families() for meta in family.templates):
            TEMPLATE_MAPPING.setdefault(meta.template_type, meta)
    if template_type not in TEMPLATE_MAPPING:
        near = difflib.get_close_matches(str(template_type), TEMPLATE_MAPPING, n=3)
        hint = (
            f"did you mean {' or '.join(near)}?"
            if near
            else f"some that are known: {some(sorted(TEMPLATE_MAPPING))} (docs/templates.md)"
        )
        raise UsageError(f"template {template_type!r} is unknown; {hint} (--template)")
    return TEMPLATE_MAPPING[template_type]
