"""Biases behind experts that run one by one (gpt-oss).

megatron-core adds them in place to what the last linear layer gives, which autograd forbids: that is a view of the output of
its reduction over tensor parallel ranks. Transformer Engine's experts do not come here.
"""

from __future__ import annotations

from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.moe.experts import SequentialMLP

from swiftlite.arguments.parallel import MegatronArguments


def adapt(model: GPTModel, args: MegatronArguments) -> None:
    for experts in model.modules():
        if isinstance(experts, SequentialMLP):
            for expert in experts.local_experts:
                expert.linear_fc2.register_forward_hook(lambda _, __, output: (output[0].clone(), output[1]))
