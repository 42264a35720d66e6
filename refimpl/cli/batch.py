"""`refimpl batch`: many requests from a file through the batching engine, results as they end."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from refimpl.autograd.errors import SpecError, require, where

from .common import Commands
from .engines import add_engine, limits_of, open_checkpoint, open_engine

if TYPE_CHECKING:
    from refimpl.infer import Completion, Request, Tokenizer
    from refimpl.infer.engine import Engine

SETTINGS = (
    *("temperature", "top_k", "top_p", "min_p", "repetition_penalty"),
    *("max_tokens", "seed", "logprobs", "eos", "stop"),
)
EXAMPLES = """examples:
  printf '%s\\n' '{"tokens": [3, 1, 4], "max_tokens": 8}' '{"tokens": [3, 1, 5], "max_tokens": 4, "seed": 7}' > requests.jsonl
  refimpl batch refimpl/cases/tiny requests.jsonl
  refimpl batch model/ requests.jsonl --blocks 512 --policy shortest-first > results.jsonl
  refimpl batch model/ - --invariant < requests.jsonl      (the same bits in any company)

A line is an object: "tokens" (ids) or "prompt" (text), and any of temperature, top_k, top_p, min_p, repetition_penalty,
max_tokens, seed, logprobs, eos, stop. A result is a line, printed when its request ends: its number from 0, tokens, logprobs,
text, finish. Greedy and 64 tokens unless the line says otherwise. Ctrl-C keeps what has been printed."""


def add(commands: Commands) -> None:
    """Add `batch`."""
    p = commands.add_parser(
        "batch",
        help="run many requests through the batching engine",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("checkpoint", type=Path, help="a folder with config.json, weights and, for text, tokenizer.json")
    p.add_argument("requests", help="a JSONL file; '-' reads standard input")
    p.add_argument(
        "--policy", default="first-come", help="first-come, shortest-first, arrival-gap or by-complexity (first-come)"
    )
    add_engine(p)
    p.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """The command; returns its exit code."""
    from refimpl.infer.engine import POLICIES

    require(args.policy in POLICIES, f"policy {args.policy!r}; known: {', '.join(POLICIES)}")
    checkpoint, folder = open_checkpoint(args.checkpoint)
    limits_of(args)
    requests = _requests(args.requests, folder, checkpoint.config or {})
    engine = open_engine(args, checkpoint, POLICIES[args.policy])
    engine.submit_all(requests)
    _serve(engine, len(requests))
    n = engine.counts
    print(
        f"{n.steps} steps, {n.run} tokens run, {n.found} found in the cache, {n.preempted} times sent away",
        file=sys.stderr,
    )
    return 0


def _serve(engine: Engine, total: int) -> None:
    """Print each request when it ends."""
    from refimpl.infer import Completion

    done, ended = [Completion() for _ in range(total)], 0
    for token in engine.drain():
        done[token.row].add(token)
        if token.finish:
            ended += 1
            print(json.dumps(_result(token.row, done[token.row])), flush=True)
        if sys.stderr.isatty():
            print(f"\r{ended} of {total} requests" + "\r" * (ended == total), end="", file=sys.stderr, flush=True)


def _result(number: int, c: Completion) -> dict[str, Any]:
    return {"request": number, "tokens": c.tokens, "logprobs": c.logprobs, "text": c.text, "finish": c.finish}


def _requests(name: str, folder: Path, config: dict[str, Any]) -> list[Request]:
    """Every line as a request; SpecError names the line."""
    from refimpl.infer import Tokenizer, eos_of

    lines = [(i, text) for i, text in enumerate(_lines(name), 1) if text.strip()]
    require(lines, f"{name} holds no requests")
    objects = []
    for i, text in lines:
        with where(f"in line {i} of {name}"):
            objects.append((i, _object(text)))
    tokenizer = Tokenizer.open(folder) if any("prompt" in o or "stop" in o for _, o in objects) else None
    eos, found = eos_of(folder, config) or (tokenizer.eos if tokenizer else ()), []
    for i, o in objects:
        with where(f"in line {i} of {name}"):
            found.append(_request(o, tokenizer, eos))
    return found


def _lines(name: str) -> Iterator[str]:
    try:
        yield from (sys.stdin.read() if name == "-" else Path(name).read_text(encoding="utf-8")).split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise SpecError(f"{name}: cannot be read: {error}") from None


def _object(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:  # JSONDecodeError, numbers of thousands of digits, deep nests
        raise SpecError(f"not JSON: {error}") from None
    require(isinstance(found, dict), f"a {type(found).__name__}; expected an object")
    unknown = sorted(set(found) - {"tokens", "prompt", *SETTINGS})
    require(not unknown, f"unknown keys: {', '.join(unknown)}; known: tokens, prompt, {', '.join(SETTINGS)}")
    require(("tokens" in found) != ("prompt" in found), "expected either tokens or prompt")
    return dict(found)


def _request(o: dict[str, Any], tokenizer: Tokenizer | None, eos: tuple[int, ...]) -> Request:
    from refimpl.infer import Request, Settings

    own: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in o.items() if k in SETTINGS}
    default: dict[str, Any] = {"temperature": 0.0, "max_tokens": 64, "eos": eos}
    settings = Settings(**(default | own))
    prompt: Any = o.get("tokens", o.get("prompt"))
    if "prompt" in o:
        require(isinstance(prompt, str), f"prompt is {prompt!r}; expected a text")
        assert tokenizer is not None
        prompt = tokenizer.encode(prompt)
    require(isinstance(prompt, list), f"tokens is {prompt!r}; expected a list of ids")
    return Request(prompt, settings, decode=tokenizer.decode if tokenizer else None)
