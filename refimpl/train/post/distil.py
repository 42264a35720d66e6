"""Distillation (R 5.1, 5.4.1): a student learns a teacher's distribution, or the answers that the teacher gave.

V3 does the second: DeepSeek-R1's generations, filtered, are examples of its fine-tuning (R 5.4.1). The divergences between logits
are described in articles, not in V3.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from refimpl.autograd import ops
from refimpl.autograd.errors import require
from refimpl.autograd.tensor import Array, data_of
from refimpl.infer import Settings
from refimpl.layers.config import Config

from .examples import Example
from .likelihood import counted, log_softmax
from .rewards import Reward
from .sampling import sample


def forward_kl(student: Any, teacher: Any, labels: Array, *, temperature: float = 1.0) -> Any:
    """KL(teacher || student) = sum_v p_T (log p_T - log p_S), mean over labels that count (Hinton et al. 2015, arXiv 1503.02531,
    whose factor T^2 is left to the caller). It covers all that the teacher says.  student, teacher (B, S, V), labels (B, S) -> ().
    """
    log_s, log_t, counts = _logs(student, teacher, labels, temperature)
    return _mean(ops.sum(ops.exp(log_t) * (log_t - log_s), axis=-1), counts)


def reverse_kl(student: Any, teacher: Any, labels: Array, *, temperature: float = 1.0) -> Any:
    """KL(student || teacher) = sum_v p_S (log p_S - log p_T), mean over labels that count (Gu et al. 2023, MiniLLM, arXiv
    2306.08543). It avoids what the teacher does not say.  student, teacher (B, S, V), labels (B, S) -> ().
    """
    log_s, log_t, counts = _logs(student, teacher, labels, temperature)
    return _mean(ops.sum(ops.exp(log_s) * (log_s - log_t), axis=-1), counts)


def generated(
    c: Config,
    teacher: Mapping[str, Array],
    prompts: Sequence[Sequence[int]],
    settings: Settings,
    *,
    keep: Reward | None = None,
) -> list[Example]:
    """The teacher's answers as examples for fine-tuning (Kim and Rush 2016, arXiv 1606.07947); with `keep` only those that it
    rewards above 0 (R 5.1: rejection sampling).
    """
    return [e for e in sample(c, teacher, prompts, settings) if keep is None or keep(e.prompt, e.answer) > 0]


def _logs(student: Any, teacher: Any, labels: Array, temperature: float) -> tuple[Any, Array, Array]:
    same = student.shape == teacher.shape and student.shape[:2] == labels.shape
    require(same, f"student {student.shape}, teacher {teacher.shape}, labels {labels.shape} do not fit each other")
    require(temperature > 0, f"temperature is {temperature}; it must be positive")
    counts = counted(labels)
    require(counts.any(), "no label counts")
    of = [log_softmax(z[:, :-1] * (1 / temperature)) for z in (student, data_of(teacher))]
    return of[0], of[1], counts


def _mean(terms: Any, counts: Array) -> Any:
    return ops.sum(terms * (counts / counts.sum()).astype(terms.dtype))
