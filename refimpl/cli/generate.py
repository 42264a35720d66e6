"""`refimpl generate`: text from a checkpoint, token by token."""

from __future__ import annotations

import argparse
import json
import sys
import time
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from refimpl.autograd.errors import SpecError, require, where

from .common import Commands, gib

if TYPE_CHECKING:
    from refimpl.checkpoint import Checkpoint
    from refimpl.infer import Beam, Completion, Request, Speculation, Tally, Token, Tokenizer
    from refimpl.model import Impl

EXAMPLES = """examples:
  refimpl generate model/ --prompt "The capital of France is" --max-tokens 20 --stream
  refimpl generate model/ --chat --prompt "Hello!" --temperature 0.6 --top-p 0.95 --seed 7
  refimpl generate model/ --prompt "def f(x):" --speculative        (drafts by the checkpoint's MTP modules)
  refimpl generate refimpl/cases/tiny --tokens 3,1,4,1,5 --max-tokens 8   (without a tokenizer: ids in, ids out)
  refimpl generate DeepSeek-V3/ --prompt "1 + 1 =" --max-tokens 2 --stream-weights 8   (671B from disk, 8 GiB of cache)

The result goes to standard output, rates to standard error. Greedy unless --temperature says otherwise."""


def add(commands: Commands) -> None:
    """Add `generate`."""
    p = commands.add_parser(
        "generate",
        help="generate text from a checkpoint",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("checkpoint", type=Path, help="a folder with config.json, weights and, for text, tokenizer.json")
    p.add_argument(
        "--prompt", action="append", default=[], help="a text; '-' reads standard input; several make a batch"
    )
    p.add_argument(
        "--tokens", action="append", default=[], metavar="IDS", help="a prompt as ids, e.g. 3,1,4 (repeatable)"
    )
    p.add_argument("--chat", action="store_true", help="put each prompt into the checkpoint's chat template")
    p.add_argument("--system", help="the system message of --chat")
    p.add_argument("--max-tokens", type=int, default=64, help="at most so many new tokens (default: 64)")
    _add_sampler(p)
    p.add_argument("--stream", action="store_true", help="print while tokens come (with --json: one object a token)")
    p.add_argument("--json", action="store_true", help="print one JSON object a prompt")
    p.add_argument(
        "--speculative", type=int, nargs="?", const=1, metavar="DEPTH", help="draft so many tokens by MTP (1)"
    )
    p.add_argument("--recycle", action="store_true", help="beyond the last MTP module, use it again")
    p.add_argument("--beams", type=int, metavar="N", help="beam search instead of sampling")
    p.add_argument("--precision", default="float32", help="float64, float32, bf16 or fp8 (default: float32)")
    p.add_argument("--kv-format", choices=["fp8", "int8"], help="keep the latent cache in bytes")
    p.add_argument(
        "--stream-weights",
        type=float,
        nargs="?",
        const=1.0,
        metavar="GIB",
        help="leave the matrices on disk, read what a token needs, keep what is used most in so much memory (1)",
    )
    p.set_defaults(run=run)


def _add_sampler(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "--temperature", type=float, default=0.0, help="0 is greedy (default), 1 the model's own distribution"
    )
    p.add_argument("--top-k", type=int, help="only the k most likely tokens")
    p.add_argument("--top-p", type=float, default=1.0, help="only the most likely tokens that hold this probability")
    p.add_argument("--min-p", type=float, default=0.0, help="only tokens with this part of the largest probability")
    p.add_argument("--repetition-penalty", type=float, default=1.0, help="above 1: tokens seen become less likely")
    p.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end before this text (repeatable)")
    p.add_argument("--seed", type=int, default=0, help="prompt i draws from seed + i (default: 0)")
    p.add_argument(
        "--logprobs", type=int, default=0, metavar="N", help="with --json: the N most likely tokens at each place"
    )
    p.add_argument("--ignore-eos", action="store_true", help="go on after the end token")


def run(args: argparse.Namespace) -> int:
    """The command; returns its exit code."""
    from refimpl.checkpoint import Checkpoint
    from refimpl.infer import Speculation
    from refimpl.model import Impl

    require(args.prompt or args.tokens, "nothing to go on from; give --prompt TEXT or --tokens IDS")
    require(not args.recycle or args.speculative, "--recycle is about drafts; give --speculative DEPTH")
    _check_beams(args)
    require(args.prompt or not args.chat, "--chat is about texts; give --prompt TEXT")
    require(args.chat or args.system is None, "--system is a message of --chat")
    require(args.json or not args.logprobs, "--logprobs are shown by --json")
    many = len(args.prompt) + len(args.tokens) > 1
    require(
        not (args.stream and many) or args.json, "--stream of several prompts needs --json: their tokens come mixed"
    )
    checkpoint = Checkpoint.open(args.checkpoint)
    require(checkpoint.config is not None, f"{args.checkpoint} has no config.json")
    impl = Impl(precision=args.precision, kv_format=args.kv_format)
    speculate = None if args.speculative is None else Speculation(args.speculative, args.recycle)
    folder = args.checkpoint if args.checkpoint.is_dir() else args.checkpoint.parent
    requests, tokenizer = _requests(args, folder, checkpoint.config or {})
    _watch(f"loading {args.checkpoint}")
    with _loaded(args, impl, checkpoint):
        return _answer(args, impl, requests, tokenizer, speculate)


def _check_beams(args: argparse.Namespace) -> None:
    """SpecError for what a search by the model's own distribution has no use for."""
    given = {"--stream": args.stream, "--speculative": args.speculative is not None, "--temperature": args.temperature}
    given |= {"--stop": args.stop, "--top-k": args.top_k is not None, "--top-p": args.top_p != 1, "--min-p": args.min_p}
    given |= {"--repetition-penalty": args.repetition_penalty != 1, "--logprobs": args.logprobs, "--seed": args.seed}
    useless = ", ".join(name for name, there in given.items() if there)
    require(args.beams is None or not useless, f"--beams goes with none of {useless}")


def _loaded(args: argparse.Namespace, impl: Impl, checkpoint: Checkpoint) -> AbstractContextManager[Any]:
    """Give the model its weights: all of them, or, inside the context, those that it needs when it needs them."""
    from refimpl.infer.from_disk import load_from_disk

    if args.stream_weights is not None:
        return load_from_disk(impl, checkpoint, budget=gib(args.stream_weights))
    impl.load(checkpoint.config or {}, checkpoint)
    return nullcontext()


def _answer(
    args: argparse.Namespace,
    impl: Impl,
    requests: list[Request],
    tokenizer: Tokenizer | None,
    speculate: Speculation | None,
) -> int:
    from refimpl.infer import Tally

    if args.beams is not None:
        return _beams(args, impl, requests, tokenizer)
    tally, started = Tally(), time.perf_counter()
    done, first = _generate(args, impl, requests, speculate, tally)
    _watch("")
    print(_rates(requests, done, tally, first - started, time.perf_counter() - first, bool(speculate)), file=sys.stderr)
    return 0


def _requests(args: argparse.Namespace, folder: Path, config: dict[str, Any]) -> tuple[list[Request], Tokenizer | None]:
    from refimpl.infer import Request, Settings, Tokenizer, eos_of

    tokenizer = Tokenizer.open(folder) if args.prompt or args.stop else None
    prompts = [_encoded(tokenizer, text, args) for text in args.prompt] + [_ids(text) for text in args.tokens]
    with where(f"while reading {folder}"):
        eos = () if args.ignore_eos else eos_of(folder, config) or (tokenizer.eos if tokenizer else ())
    requests = []
    for i, prompt in enumerate(prompts):
        own = {
            n: getattr(args, n) for n in ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "logprobs")
        }
        settings = Settings(**own, max_tokens=args.max_tokens, eos=eos, stop=tuple(args.stop), seed=args.seed + i)
        requests.append(Request(prompt, settings, decode=tokenizer.decode if tokenizer else None))
    return requests, tokenizer


def _encoded(tokenizer: Tokenizer | None, text: str, args: argparse.Namespace) -> list[int]:
    assert tokenizer is not None
    text = _input() if text == "-" else text
    if not args.chat:
        return tokenizer.encode(text)
    system = [{"role": "system", "content": args.system}] if args.system else []
    return tokenizer.chat([*system, {"role": "user", "content": text}])


def _input() -> str:
    try:
        return sys.stdin.read()
    except UnicodeDecodeError as error:
        raise SpecError(f"standard input is no text: {error}") from None


def _ids(text: str) -> list[int]:
    try:
        return [int(t) for t in text.replace(",", " ").split()]
    except ValueError:
        raise SpecError(f"--tokens {text!r}; expected ids such as 3,1,4") from None


def _generate(
    args: argparse.Namespace, impl: Impl, requests: list[Request], speculate: Any, tally: Tally
) -> tuple[list[Completion], float]:
    """Everything that came, also when interrupted, and when the first token did."""
    from refimpl.infer import Completion, stream

    done, tops = [Completion() for _ in requests], [list[Any]() for _ in requests]
    tokens, first = stream(impl, requests, speculate=speculate, tally=tally), 0.0
    started = time.perf_counter()
    _watch("reading the prompt")
    try:
        for token in tokens:
            first = first or time.perf_counter()
            done[token.row].add(token)
            tops[token.row].append(token.top)
            if args.stream:
                _show(args, token, text=requests[token.row].decode is not None)
            else:
                count = sum(len(c.tokens) for c in done)
                _watch(f"{count} tokens, {count / (time.perf_counter() - started):.1f} a second")
    finally:  # what came before Ctrl-C is printed, too
        _watch("")
        if args.stream and not args.json:
            print(flush=True)
        elif not args.stream:
            for i, (c, top) in enumerate(zip(done, tops, strict=True)):
                print(
                    json.dumps(_whole(i, c, top)) if args.json else c.text if requests[i].decode else _joined(c.tokens)
                )
    return done, first


def _show(args: argparse.Namespace, token: Token, *, text: bool) -> None:
    if args.json:
        piece = {
            "prompt": token.row,
            "token": token.id,
            "logprob": token.logprob,
            "text": token.text,
            "finish": token.finish,
        }
        print(json.dumps(piece | ({"top": token.top} if token.top else {})), flush=True)
    else:
        print(token.text if text else f"{token.id} ", end="", flush=True)


def _whole(prompt: int, c: Completion, top: list[Any]) -> dict[str, Any]:
    found = {"prompt": prompt, "tokens": c.tokens, "logprobs": c.logprobs, "text": c.text, "finish": c.finish}
    return found | ({"top": top} if any(top) else {})


def _beams(args: argparse.Namespace, impl: Impl, requests: list[Request], tokenizer: Tokenizer | None) -> int:
    from refimpl.infer import search_beams

    for i, r in enumerate(requests):
        found: list[Beam] = []
        n = 0
        _watch(f"reading the prompt of {args.beams} beams")
        try:
            search = search_beams(impl, r.prompt, beams=args.beams, max_tokens=args.max_tokens, eos=r.settings.eos)
            for n, found in enumerate(search, 1):
                _watch(f"{len(found)} beams, {n} of at most {args.max_tokens} tokens")
        except KeyboardInterrupt:
            _watch("")
            print(f"prompt {i}: interrupted after {n} tokens; the best beams so far", file=sys.stderr)
            raise
        finally:
            _watch("")
            _show_beams(args, i, found, tokenizer)
    return 0


def _show_beams(args: argparse.Namespace, prompt: int, found: list[Beam], tokenizer: Tokenizer | None) -> None:
    """The best one, or with --json all."""
    for beam in found if args.json else found[:1]:
        text = tokenizer.decode(beam.tokens) if tokenizer else ""
        whole = {"prompt": prompt, "tokens": beam.tokens, "logprob": beam.logprob, "score": beam.score, "text": text}
        print(json.dumps(whole) if args.json else text if tokenizer else _joined(list(beam.tokens)))


def _joined(ids: list[int]) -> str:
    return " ".join(map(str, ids))


def _rates(
    requests: list[Request], done: list[Completion], tally: Tally, before: float, after: float, drafted: bool
) -> str:
    """`5 + 20 tokens; prompt 0.02 s, then 93.1 tokens/s; 1.4 tokens a step, drafts stood 41 %`."""
    old, new = sum(len(r.prompt) for r in requests), sum(len(c.tokens) for c in done)
    later = new - len(done)  # the first ones come with the prompt
    line = f"{old} + {new} tokens; prompt {before:.2f} s" + (f", then {later / after:.1f} tokens/s" if later else "")
    if not drafted:
        return line
    stood = ", ".join(f"{100 * a:.0f} %" for a in tally.acceptance) or "none made"
    return f"{line}; {tally.tokens_per_step:.2f} tokens a step, drafts stood {stood}"


def _watch(text: str) -> None:
    """A line that is written over, for people who watch."""
    if sys.stderr.isatty():
        print(f"\r{text:<72.72}" + ("\r" if not text else ""), end="", file=sys.stderr, flush=True)
