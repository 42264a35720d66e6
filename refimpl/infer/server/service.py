"""What is served, and what one client may ask of it."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from refimpl.autograd.errors import require
from refimpl.infer.engine import Engine
from refimpl.infer.tokenizer import Tokenizer
from refimpl.layers.config import Config

from .worker import Worker


@dataclass(frozen=True)
class Bounds:
    """`body`: bytes of a request. `tokens`: of one answer. `concurrency`: choices being written, and HTTP requests being answered.
    `seconds`: how long a client may say nothing while it sends its body, or read nothing while it is sent an answer.
    """

    body: int = 1 << 20
    tokens: int = 4096
    concurrency: int = 128
    seconds: float = 60.0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            require(0 < value < 1 << 31, f"{name} is {value!r}; expected above 0, below 2^31")
        require(self.seconds <= 86_400, f"seconds is {self.seconds!r}; expected a day at most")


@dataclass(frozen=True)
class Service:
    """A checkpoint under a name: its engine in a worker, its tokenizer if it has one, the ids that end its texts."""

    name: str
    engine: Engine
    tokenizer: Tokenizer | None = None
    eos: tuple[int, ...] = ()
    bounds: Bounds = Bounds()
    created: int = field(default_factory=lambda: int(time.time()))
    worker: Worker = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "worker", Worker(self.engine, most=self.bounds.concurrency))

    @property
    def config(self) -> Config:
        """The model's."""
        return self.engine.impl.model.config

    @property
    def held(self) -> int:
        """The most tokens of a prompt and its answer that the cache has room for; the last one is never fed."""
        blocks = self.engine.pages.blocks
        return blocks.count * blocks.size + 1

    def room(self, prompt: int) -> int:
        """The most tokens that may follow on a prompt: by the window, the cache and the bounds; at least 1."""
        return max(1, min(self.bounds.tokens, self.config.max_position_embeddings - prompt, self.held - prompt))
