"""LLaMA and the many models of its architecture: grouped-query attention, no biases, no q/k norm."""

from __future__ import annotations

from swiftlite.families import register_family
from swiftlite.families.blocks import (
    ATTENTION,
    EMBED,
    GPT_CONFIG,
    MLP,
    REFUSE_OUTPUT_BIAS,
    STORED_TIED_HEAD,
)
from swiftlite.families.meta.family import Family
from swiftlite.families.meta.mcore import McoreMeta
from swiftlite.families.meta.model import ModelGroup, ModelMeta, ids
from swiftlite.weights.rule import WeightMap

register_family(
    Family(
        "llama",
        architectures=("LlamaForCausalLM",),
        mcore=McoreMeta(
            config=GPT_CONFIG,
            patches=(*REFUSE_OUTPUT_BIAS,),
            weights=WeightMap(
                top=EMBED,
                layer=ATTENTION + MLP,
                duplicates=STORED_TIED_HEAD,
            ),
        ),
        models=(
            ModelMeta(
                "llama",
                (
                    ModelGroup(
                        ids(
                            ("modelscope/Llama-2-7b-ms", "meta-llama/Llama-2-7b-hf"),
                            ("modelscope/Llama-2-13b-ms", "meta-llama/Llama-2-13b-hf"),
                            ("modelscope/Llama-2-70b-ms", "meta-llama/Llama-2-70b-hf"),
                            ("modelscope/Llama-2-7b-chat-ms", "meta-llama/Llama-2-7b-chat-hf"),
                            ("modelscope/Llama-2-13b-chat-ms", "meta-llama/Llama-2-13b-chat-hf"),
                            ("modelscope/Llama-2-70b-chat-ms", "meta-llama/Llama-2-70b-chat-hf"),
                        ),
                        ignore_patterns=(r".+\.bin$",),
                    ),
                    ModelGroup(
                        ids(
                            ("AI-ModelScope/chinese-llama-2-1.3b", "hfl/chinese-llama-2-1.3b"),
                            ("AI-ModelScope/chinese-llama-2-7b", "hfl/chinese-llama-2-7b"),
                            ("AI-ModelScope/chinese-llama-2-7b-16k", "hfl/chinese-llama-2-7b-16k"),
                            ("AI-ModelScope/chinese-llama-2-7b-64k", "hfl/chinese-llama-2-7b-64k"),
                            ("AI-ModelScope/chinese-llama-2-13b", "hfl/chinese-llama-2-13b"),
                            ("AI-ModelScope/chinese-llama-2-13b-16k", "hfl/chinese-llama-2-13b-16k"),
                            ("AI-ModelScope/chinese-alpaca-2-1.3b", "hfl/chinese-alpaca-2-1.3b"),
                            ("AI-ModelScope/chinese-alpaca-2-7b", "hfl/chinese-alpaca-2-7b"),
                            ("AI-ModelScope/chinese-alpaca-2-7b-16k", "hfl/chinese-alpaca-2-7b-16k"),
                            ("AI-ModelScope/chinese-alpaca-2-7b-64k", "hfl/chinese-alpaca-2-7b-64k"),
                            ("AI-ModelScope/chinese-alpaca-2-13b", "hfl/chinese-alpaca-2-13b"),
                            ("AI-ModelScope/chinese-alpaca-2-13b-16k", "hfl/chinese-alpaca-2-13b-16k"),
                        ),
                    ),
                    ModelGroup(
                        ids(
                            ("AI-ModelScope/Llama-2-7b-AQLM-2Bit-1x16-hf", "ISTA-DASLab/Llama-2-7b-AQLM-2Bit-1x16-hf"),
                        ),
                        requires=("transformers>=4.38", "aqlm", "torch>=2.2.0"),
                    ),
                ),
                template="llama",
                architectures=("LlamaForCausalLM",),
                model_arch="llama",
            ),
            ModelMeta(
                "llama3",
                (
                    ModelGroup(
                        ids(
                            ("LLM-Research/Meta-Llama-3-8B-Instruct", "meta-llama/Meta-Llama-3-8B-Instruct"),
                            ("LLM-Research/Meta-Llama-3-70B-Instruct", "meta-llama/Meta-Llama-3-70B-Instruct"),
                            ("LLM-Research/Meta-Llama-3-8B", "meta-llama/Meta-Llama-3-8B"),
                            ("LLM-Research/Meta-Llama-3-70B", "meta-llama/Meta-Llama-3-70B"),
                        ),
                    ),
                    ModelGroup(
                        ids(
                            (
                                "swift/Meta-Llama-3-8B-Instruct-GPTQ-Int4",
                                "study-hjt/Meta-Llama-3-8B-Instruct-GPTQ-Int4",
                            ),
                            (
                                "swift/Meta-Llama-3-8B-Instruct-GPTQ-Int8",
                                "study-hjt/Meta-Llama-3-8B-Instruct-GPTQ-Int8",
                            ),
                            ("swift/Meta-Llama-3-8B-Instruct-AWQ", "study-hjt/Meta-Llama-3-8B-Instruct-AWQ"),
                            (
                                "swift/Meta-Llama-3-70B-Instruct-GPTQ-Int4",
                                "study-hjt/Meta-Llama-3-70B-Instruct-GPTQ-Int4",
                            ),
                            (
                                "swift/Meta-Llama-3-70B-Instruct-GPTQ-Int8",
                                "study-hjt/Meta-Llama-3-70B-Instruct-GPTQ-Int8",
                            ),
                            ("swift/Meta-Llama-3-70B-Instruct-AWQ", "study-hjt/Meta-Llama-3-70B-Instruct-AWQ"),
                        ),
                    ),
                    ModelGroup(
                        ids(
                            ("ChineseAlpacaGroup/llama-3-chinese-8b-instruct", "hfl/llama-3-chinese-8b-instruct"),
                            ("ChineseAlpacaGroup/llama-3-chinese-8b", "hfl/llama-3-chinese-8b"),
                        ),
                    ),
                ),
                template="llama3",
                architectures=("LlamaForCausalLM",),
                model_arch="llama",
            ),
            ModelMeta(
                "llama3_1",
                (
                    ModelGroup(
                        ids(
                            ("LLM-Research/Meta-Llama-3.1-8B-Instruct", "meta-llama/Meta-Llama-3.1-8B-Instruct"),
                            ("LLM-Research/Meta-Llama-3.1-70B-Instruct", "meta-llama/Meta-Llama-3.1-70B-Instruct"),
                            ("LLM-Research/Meta-Llama-3.1-405B-Instruct", "meta-llama/Meta-Llama-3.1-405B-Instruct"),
                            ("LLM-Research/Meta-Llama-3.1-8B", "meta-llama/Meta-Llama-3.1-8B"),
                            ("LLM-Research/Meta-Llama-3.1-70B", "meta-llama/Meta-Llama-3.1-70B"),
                            ("LLM-Research/Meta-Llama-3.1-405B", "meta-llama/Meta-Llama-3.1-405B"),
                            (
                                "LLM-Research/Meta-Llama-3.1-70B-Instruct-FP8",
                                "meta-llama/Meta-Llama-3.1-70B-Instruct-FP8",
                            ),
                            (
                                "LLM-Research/Meta-Llama-3.1-405B-Instruct-FP8",
                                "meta-llama/Meta-Llama-3.1-405B-Instruct-FP8",
                            ),
                        ),
                    ),
                    ModelGroup(
                        ids(
                            (
                                "LLM-Research/Meta-Llama-3.1-8B-Instruct-BNB-NF4",
                                "hugging-quants/Meta-Llama-3.1-8B-Instruct-BNB-NF4",
                            ),
                            (
                                "LLM-Research/Meta-Llama-3.1-70B-Instruct-bnb-4bit",
                                "unsloth/Meta-Llama-3.1-70B-Instruct-bnb-4bit",
                            ),
                            (
                                "LLM-Research/Meta-Llama-3.1-405B-Instruct-BNB-NF4",
                                "hugging-quants/Meta-Llama-3.1-405B-Instruct-BNB-NF4",
                            ),
                            (
                                "LLM-Research/Meta-Llama-3.1-8B-Instruct-GPTQ-INT4",
                                "hugging-quants/Meta-Llama-3.1-8B-Instruct-GPTQ-INT4",
                            ),
                            (
                                "LLM-Research/Meta-Llama-3.1-70B-Instruct-GPTQ-INT4",
                                "hugging-quants/Meta-Llama-3.1-70B-Instruct-GPTQ-INT4",
                            ),
                            (
                                "LLM-Research/Meta-Llama-3.1-405B-Instruct-GPTQ-INT4",
                                "hugging-quants/Meta-Llama-3.1-405B-Instruct-GPTQ-INT4",
                            ),
                            (
                                "LLM-Research/Meta-Llama-3.1-8B-Instruct-AWQ-INT4",
                                "hugging-quants/Meta-Llama-3.1-8B-Instruct-AWQ-INT4",
                            ),
                            (
                                "LLM-Research/Meta-Llama-3.1-70B-Instruct-AWQ-INT4",
                                "hugging-quants/Meta-Llama-3.1-70B-Instruct-AWQ-INT4",
                            ),
                            (
                                "LLM-Research/Meta-Llama-3.1-405B-Instruct-AWQ-INT4",
                                "hugging-quants/Meta-Llama-3.1-405B-Instruct-AWQ-INT4",
                            ),
                        ),
                    ),
                    ModelGroup(
                        ids(
                            (
                                "AI-ModelScope/Llama-3.1-Nemotron-70B-Instruct-HF",
                                "nvidia/Llama-3.1-Nemotron-70B-Instruct-HF",
                            ),
                        ),
                    ),
                ),
                template="llama3_2",
                architectures=("LlamaForCausalLM",),
                model_arch="llama",
                requires=("transformers>=4.43",),
            ),
            ModelMeta(
                "llama3_2",
                (
                    ModelGroup(
                        ids(
                            ("LLM-Research/Llama-3.2-1B", "meta-llama/Llama-3.2-1B"),
                            ("LLM-Research/Llama-3.2-3B", "meta-llama/Llama-3.2-3B"),
                            ("LLM-Research/Llama-3.2-1B-Instruct", "meta-llama/Llama-3.2-1B-Instruct"),
                            ("LLM-Research/Llama-3.2-3B-Instruct", "meta-llama/Llama-3.2-3B-Instruct"),
                        ),
                    ),
                    ModelGroup(
                        ids(
                            ("LLM-Research/Llama-3.3-70B-Instruct", "meta-llama/Llama-3.3-70B-Instruct"),
                            "unsloth/Llama-3.3-70B-Instruct-bnb-4bit",
                        ),
                    ),
                ),
                template="llama3_2",
                architectures=("LlamaForCausalLM",),
                model_arch="llama",
                requires=("transformers>=4.43",),
            ),
            ModelMeta(
                "longwriter_llama3_1",
                (
                    ModelGroup(
                        ids(
                            ("ZhipuAI/LongWriter-llama3.1-8b", "zai-org/LongWriter-llama3.1-8b"),
                        ),
                    ),
                ),
                template="longwriter_llama",
                architectures=("LlamaForCausalLM",),
                model_arch="llama",
                requires=("transformers>=4.43",),
            ),
            ModelMeta(
                "codefuse_codellama",
                (
                    ModelGroup(
                        ids(
                            "codefuse-ai/CodeFuse-CodeLlama-34B",
                        ),
                        tags=("coding",),
                    ),
                ),
                template="codefuse_codellama",
                architectures=("LlamaForCausalLM",),
                model_arch="llama",
            ),
            ModelMeta(
                "deepseek",
                (
                    ModelGroup(
                        ids(
                            "deepseek-ai/deepseek-llm-7b-base",
                            "deepseek-ai/deepseek-llm-7b-chat",
                            "deepseek-ai/deepseek-llm-67b-base",
                            "deepseek-ai/deepseek-llm-67b-chat",
                        ),
                    ),
                    ModelGroup(
                        ids(
                            "deepseek-ai/deepseek-math-7b-base",
                            "deepseek-ai/deepseek-math-7b-instruct",
                            "deepseek-ai/deepseek-math-7b-rl",
                        ),
                        tags=("math",),
                    ),
                    ModelGroup(
                        ids(
                            "deepseek-ai/deepseek-coder-1.3b-base",
                            "deepseek-ai/deepseek-coder-1.3b-instruct",
                            "deepseek-ai/deepseek-coder-6.7b-base",
                            "deepseek-ai/deepseek-coder-6.7b-instruct",
                            "deepseek-ai/deepseek-coder-33b-base",
                            "deepseek-ai/deepseek-coder-33b-instruct",
                        ),
                        tags=("coding",),
                    ),
                ),
                template="deepseek",
                architectures=("LlamaForCausalLM",),
                model_arch="llama",
            ),
            ModelMeta(
                "yi",
                (
                    ModelGroup(
                        ids(
                            ("01ai/Yi-6B", "01-ai/Yi-6B"),
                            ("01ai/Yi-6B-200K", "01-ai/Yi-6B-200K"),
                            ("01ai/Yi-6B-Chat", "01-ai/Yi-6B-Chat"),
                            ("01ai/Yi-6B-Chat-4bits", "01-ai/Yi-6B-Chat-4bits"),
                            ("01ai/Yi-6B-Chat-8bits", "01-ai/Yi-6B-Chat-8bits"),
                            ("01ai/Yi-9B", "01-ai/Yi-9B"),
                            ("01ai/Yi-9B-200K", "01-ai/Yi-9B-200K"),
                            ("01ai/Yi-34B", "01-ai/Yi-34B"),
                            ("01ai/Yi-34B-200K", "01-ai/Yi-34B-200K"),
                            ("01ai/Yi-34B-Chat", "01-ai/Yi-34B-Chat"),
                            ("01ai/Yi-34B-Chat-4bits", "01-ai/Yi-34B-Chat-4bits"),
                            ("01ai/Yi-34B-Chat-8bits", "01-ai/Yi-34B-Chat-8bits"),
                        ),
                    ),
                    ModelGroup(
                        ids(
                            ("01ai/Yi-1.5-6B", "01-ai/Yi-1.5-6B"),
                            ("01ai/Yi-1.5-6B-Chat", "01-ai/Yi-1.5-6B-Chat"),
                            ("01ai/Yi-1.5-9B", "01-ai/Yi-1.5-9B"),
                            ("01ai/Yi-1.5-9B-Chat", "01-ai/Yi-1.5-9B-Chat"),
                            ("01ai/Yi-1.5-9B-Chat-16K", "01-ai/Yi-1.5-9B-Chat-16K"),
                            ("01ai/Yi-1.5-34B", "01-ai/Yi-1.5-34B"),
                            ("01ai/Yi-1.5-34B-Chat", "01-ai/Yi-1.5-34B-Chat"),
                            ("01ai/Yi-1.5-34B-Chat-16K", "01-ai/Yi-1.5-34B-Chat-16K"),
                        ),
                    ),
                    ModelGroup(
                        ids(
                            ("AI-ModelScope/Yi-1.5-6B-Chat-GPTQ", "modelscope/Yi-1.5-6B-Chat-GPTQ"),
                            ("AI-ModelScope/Yi-1.5-6B-Chat-AWQ", "modelscope/Yi-1.5-6B-Chat-AWQ"),
                            ("AI-ModelScope/Yi-1.5-9B-Chat-GPTQ", "modelscope/Yi-1.5-9B-Chat-GPTQ"),
                            ("AI-ModelScope/Yi-1.5-9B-Chat-AWQ", "modelscope/Yi-1.5-9B-Chat-AWQ"),
                            ("AI-ModelScope/Yi-1.5-34B-Chat-GPTQ", "modelscope/Yi-1.5-34B-Chat-GPTQ"),
                            ("AI-ModelScope/Yi-1.5-34B-Chat-AWQ", "modelscope/Yi-1.5-34B-Chat-AWQ"),
                        ),
                    ),
                ),
                template="chatml",
                architectures=("LlamaForCausalLM",),
                model_arch="llama",
            ),
            ModelMeta(
                "yi_coder",
                (
                    ModelGroup(
                        ids(
                            ("01ai/Yi-Coder-1.5B", "01-ai/Yi-Coder-1.5B"),
                            ("01ai/Yi-Coder-9B", "01-ai/Yi-Coder-9B"),
                            ("01ai/Yi-Coder-1.5B-Chat", "01-ai/Yi-Coder-1.5B-Chat"),
                            ("01ai/Yi-Coder-9B-Chat", "01-ai/Yi-Coder-9B-Chat"),
                        ),
                    ),
                ),
                template="yi_coder",
                architectures=("LlamaForCausalLM",),
                model_arch="llama",
                tags=("coding",),
            ),
            ModelMeta(
                "sus",
                (
                    ModelGroup(
                        ids(
                            ("SUSTC/SUS-Chat-34B", "SUSTech/SUS-Chat-34B"),
                        ),
                    ),
                ),
                template="sus",
                architectures=("LlamaForCausalLM",),
                model_arch="llama",
            ),
            ModelMeta(
                "skywork_o1",
                (
                    ModelGroup(
                        ids(
                            ("AI-ModelScope/Skywork-o1-Open-Llama-3.1-8B", "Skywork/Skywork-o1-Open-Llama-3.1-8B"),
                        ),
                    ),
                ),
                template="skywork_o1",
                architectures=("LlamaForCausalLM",),
                model_arch="llama",
                requires=("transformers>=4.43",),
            ),
            ModelMeta(
                "openbuddy_llama",
                (
                    ModelGroup(
                        ids(
                            "OpenBuddy/openbuddy-llama-65b-v8-bf16",
                        ),
                    ),
                    ModelGroup(
                        ids(
                            "OpenBuddy/openbuddy-llama2-13b-v8.1-fp16",
                            "OpenBuddy/openbuddy-llama2-70b-v10.1-bf16",
                        ),
                    ),
                    ModelGroup(
                        ids(
                            "OpenBuddy/openbuddy-deepseek-67b-v15.2",
                        ),
                    ),
                ),
                template="openbuddy",
                architectures=("LlamaForCausalLM",),
                model_arch="llama",
            ),
            ModelMeta(
                "openbuddy_llama3",
                (
                    ModelGroup(
                        ids(
                            "OpenBuddy/openbuddy-llama3-8b-v21.1-8k",
                            "OpenBuddy/openbuddy-llama3-70b-v21.1-8k",
                            "OpenBuddy/openbuddy-yi1.5-34b-v21.3-32k",
                        ),
                    ),
                    ModelGroup(
                        ids(
                            "OpenBuddy/openbuddy-llama3.1-8b-v22.1-131k",
                            "OpenBuddy/openbuddy-nemotron-70b-v23.2-131k",
                        ),
                        requires=("transformers>=4.43",),
                    ),
                    ModelGroup(
                        ids(
                            "OpenBuddy/openbuddy-llama3.3-70b-v24.3-131k",
                        ),
                        requires=("transformers>=4.45",),
                    ),
                ),
                template="openbuddy2",
                architectures=("LlamaForCausalLM",),
                model_arch="llama",
            ),
            ModelMeta(
                "megrez",
                (
                    ModelGroup(
                        ids(
                            ("InfiniAI/Megrez-3b-Instruct", "Infinigence/Megrez-3B-Instruct"),
                        ),
                    ),
                ),
                template="megrez",
                architectures=("LlamaForCausalLM",),
                model_arch="llama",
            ),
            ModelMeta(
                "reflection",
                (
                    ModelGroup(
                        ids(
                            ("LLM-Research/Reflection-Llama-3.1-70B", "mattshumer/Reflection-Llama-3.1-70B"),
                        ),
                    ),
                ),
                template="reflection",
                architectures=("LlamaForCausalLM",),
                model_arch="llama",
                requires=("transformers>=4.43",),
            ),
            ModelMeta(
                "numina",
                (
                    ModelGroup(
                        ids(
                            ("AI-ModelScope/NuminaMath-7B-TIR", "AI-MO/NuminaMath-7B-TIR"),
                        ),
                    ),
                ),
                template="numina",
                architectures=("LlamaForCausalLM",),
                model_arch="llama",
                tags=("math",),
            ),
            ModelMeta(
                "ziya",
                (
                    ModelGroup(
                        ids(
                            ("Fengshenbang/Ziya2-13B-Base", "IDEA-CCNL/Ziya2-13B-Base"),
                            ("Fengshenbang/Ziya2-13B-Chat", "IDEA-CCNL/Ziya2-13B-Chat"),
                        ),
                    ),
                ),
                template="ziya",
                architectures=("LlamaForCausalLM",),
                model_arch="llama",
            ),
            ModelMeta(
                "mengzi3",
                (
                    ModelGroup(
                        ids(
                            ("langboat/Mengzi3-13B-Base", "Langboat/Mengzi3-13B-Base"),
                        ),
                    ),
                ),
                template="mengzi",
                architectures=("LlamaForCausalLM",),
                model_arch="llama",
            ),
        ),
    )
)
