"""A request as the scheduler sees it: tokens, how far they are computed, blocks. No model, so that a simulation has the same."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(eq=False)
class Job:
    """`tokens`: prompt and what was decided since; `left`: how many may still come; `computed`: of how many the latents are in the
    blocks of `table`.
    """

    id: int
    arrival: float
    tokens: list[int]
    left: int
    prompt: int = 0
    computed: int = 0
    table: list[int] = field(default_factory=list)
    preempted: int = 0  # times
    whole: bool = False  # nothing of it is looked for in the cache: somebody wants the logits behind every token

    def __post_init__(self) -> None:
        self.prompt = len(self.tokens)

    @property
    def missing(self) -> int:
        """Tokens to be run before the next one is known; 1 while decoding."""
        return len(self.tokens) - self.computed

    @property
    def most(self) -> int:
        """Tokens in the cache at the end: all but the last, which nobody follows."""
        return len(self.tokens) + self.left - 1


@dataclass(frozen=True)
class Work:
    """Run tokens start..stop of a job; `decides` if they reach its end, so that its next token is known then."""

    job: Job
    start: int
    stop: int
    decides: bool = False

    @property
    def pairs(self) -> int:
        """Query-key pairs of attention: token i sees i + 1."""
        return (self.start + 1 + self.stop) * (self.stop - self.start) // 2
