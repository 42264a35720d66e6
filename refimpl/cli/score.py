"""`refimpl score`: an engine that shows only tokens and log-probabilities, against a case."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from refimpl.autograd.errors import SpecError

from .common import Commands, progress

if TYPE_CHECKING:
    from refimpl.diff import Case
    from refimpl.score import Shown

_TEXT = """Hold an engine that shows only tokens and log-probabilities against a case.

WHAT is the address of an OpenAI-compatible server that serves the case's weights, or a JSON file of what it showed. The
server is asked for the log-probabilities of the case's tokens in the first way that it answers: prompt_logprobs, echo, one
request a position, tokens alone; then again, twice, in a batch and after a prefix. What may be off is what our own runs at
the declared precision are off. `refimpl case DIR --servable` writes a folder that servers load. See docs/score.md.

  refimpl case served --servable && mlx_lm.server --model served &
  refimpl score served http://127.0.0.1:8080
  refimpl score served http://127.0.0.1:8000 --precision bfloat16 --save shown.json
  refimpl score served shown.json --precision bfloat16

exit code: 0 consistent, 1 inconsistent, 2 inconclusive (tokens alone), 3 bad input (a server that does not answer, too)"""


def add(commands: Commands) -> None:
    """Add `score`."""
    raw = argparse.RawDescriptionHelpFormatter
    p = commands.add_parser(
        "score",
        help="hold a server's, or a file's, log-probabilities against a case",
        description=_TEXT,
        formatter_class=raw,
    )
    p.add_argument("case", type=Path)
    p.add_argument("what", metavar="URL|FILE")
    p.add_argument(
        "--precision",
        default="float32",
        metavar="STORAGE[,TAP=STORAGE]",
        help="what the engine computes in: float32 (default), bfloat16, float16, fp8, int8 (activations in 8-bit codes); taps "
        "kept otherwise by pattern, e.g. float32,mla.c_kv=float16,mla.k_rope=float16 for a cache in float16",
    )
    p.add_argument(
        "--weights", type=Path, metavar="FILE", help="the engine's own weights, as in `refimpl diff --weights`"
    )
    p.add_argument("--model", default="", help="the model's name in requests; by default the only one that is listed")
    p.add_argument("--top", type=int, default=20, help="most likely tokens to ask for; fewer where that is refused")
    p.add_argument("--timeout", type=float, default=60.0, metavar="S", help="seconds for one request (60)")
    p.add_argument("--retries", type=int, default=2, help="further tries after a broken connection, 429 and 5xx (2)")
    p.add_argument("--header", action="append", default=[], metavar="NAME:VALUE", help="sent with each request")
    p.add_argument("--save", type=Path, metavar="FILE", help="write what was shown, to be scored again as FILE")
    p.add_argument("--json", action="store_true", help="print JSON (schema refimpl-score/1)")
    p.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """The command; returns its exit code."""
    from refimpl.diff import Case
    from refimpl.score import expected, measure
    from refimpl.score.expectation import declared
    from refimpl.score.files import write
    from refimpl.score.report import render, to_json
    from refimpl.weights.under import with_weights

    declared(args.precision)  # a wrong one is said before a server is asked
    case = Case.read(args.case)
    notes: tuple[str, ...] = ()
    if args.weights:
        case, gate = with_weights(case, args.weights)
        notes = (f"weights   {gate.text}",)
    shown = _shown(args, case)
    if args.save:
        write(shown, args.save)
    score = measure(shown, expected(case, args.precision, track=progress("twins")))
    print(to_json(score, notes) if args.json else render(score, notes))
    return score.exit_code


def _shown(args: argparse.Namespace, case: Case) -> Shown:
    from refimpl.record.candidate import plain_only
    from refimpl.score.asking import ask
    from refimpl.score.client import Client
    from refimpl.score.files import read
    from refimpl.score.spelling import Spelling

    plain_only(case, "an engine behind its server")
    if "://" not in args.what:
        return read(args.what, case.tokens)
    if args.top < 1:
        raise SpecError(f"--top is {args.top}; at least one token is needed")
    pairs = [h.partition(":") for h in args.header]
    if not all(colon and name.strip() for name, colon, _ in pairs):
        raise SpecError("--header; expected NAME:VALUE")
    headers = {name.strip(): value.strip() for name, _, value in pairs}
    url = args.what.rstrip("/").removesuffix("/v1")
    client = Client(url, args.timeout, args.retries, headers)
    spelling = Spelling.of(args.case, case.config.vocab_size)
    return ask(client, case.tokens, spelling, model=args.model, top=args.top, track=progress("asking"))
