"""Post-training (R 5): fine-tuning on answers, GRPO with rewards by rule, distillation; and what articles describe beside it."""

from . import (
    distil,
    dpo,
    examples,
    fewer_experts,
    grpo,
    grpo_step,
    likelihood,
    lora,
    magnitude,
    peft_format,
    qat,
    replay,
    rewards,
    sampling,
    sft,
    soft_prompt,
)

__all__ = [
    "distil",
    "dpo",
    "examples",
    "fewer_experts",
    "grpo",
    "grpo_step",
    "likelihood",
    "lora",
    "magnitude",
    "peft_format",
    "qat",
    "replay",
    "rewards",
    "sampling",
    "sft",
    "soft_prompt",
]
