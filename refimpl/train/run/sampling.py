"""Text that a model makes while it learns: RUN/samples.jsonl, an object a prompt."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from refimpl.autograd import Array
from refimpl.infer import Request, Settings, generate
from refimpl.layers.config import Config
from refimpl.model import Impl
from refimpl.train.data import load_tokenizer
from refimpl.train.data.tokenizer import EOS
from refimpl.train.training import Recipe

from .job import Job

FILE = "samples.jsonl"


class Sampler:
    """The prompts of a job. SpecError where their tokenizer is not known."""

    def __init__(self, job: Job, tokenizer: str | None) -> None:
        self._how = how = job.samples
        if how is None:
            return
        self._tokenizer = load_tokenizer(job.known_tokenizer(tokenizer, "samples"))
        self._ids = [[int(i) for i in ids] for ids in self._tokenizer.encode(how.prompts)]

    def due(self, done: int, end: int) -> bool:
        """Whether text is asked for after so many steps."""
        return self._how is not None and (done % self._how.every == 0 or done == end)

    def __call__(self, done: int, c: Config, recipe: Recipe, weights: Mapping[str, Array]) -> list[dict[str, Any]]:
        """What the model makes of every prompt; prompt i draws from seed i."""
        how = self._how
        assert how is not None
        impl = Impl(precision=recipe.plan).load(c, weights)
        eos, decode = (self._tokenizer.ids[EOS],), self._tokenizer.decode
        settings = [
            Settings(temperature=how.temperature, max_tokens=how.tokens, eos=eos, seed=i) for i in range(len(self._ids))
        ]
        made = generate(impl, [Request(ids, s, decode=decode) for ids, s in zip(self._ids, settings, strict=True)])
        return [
            {"step": done, "prompt": prompt, "text": decode(one.tokens)}
            for prompt, one in zip(how.prompts, made, strict=True)
        ]
