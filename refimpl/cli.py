"""The command line. Results go to standard output, everything else to standard error; exit codes are part of the
contract.
"""

from __future__ import annotations

import argparse
import sys
import traceback
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from refimpl import plan_cli
from refimpl.autograd.errors import SpecError

BAD_INPUT = 3
INTERRUPTED = 130
INTERNAL = 70

_DIFF = """Judge a recorded run of another implementation, stage by stage.

CASE is a folder with config.json, weights.safetensors and tokens.json; CANDIDATE is a trace: a safetensors file whose
tensors are named by tap (`refimpl record hf` writes one; so can any language). Each recorded stage is re-run on the
candidate's own recorded inputs, so a wrong stage shows up alone, wherever it is.

exit code: 0 conforms, 1 diverges, 2 inconclusive (something needed was not recorded), 3 bad input"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit code."""
    args = _parser().parse_args(argv)
    try:
        code: int = args.run(args)
    except SpecError as error:
        print(f"refimpl: {error}", file=sys.stderr)
        return BAD_INPUT
    except KeyboardInterrupt:
        print("refimpl: interrupted; nothing was left half-written", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        sys.stderr.close()
        return 0
    except Exception:  # Python's own exit code 1 would read as "diverges"
        traceback.print_exc()
        print("refimpl: this is a bug of refimpl, not a verdict", file=sys.stderr)
        return INTERNAL
    return code


class _Parser(argparse.ArgumentParser):
    """argparse's own exit code 2 would read as "inconclusive"."""

    def error(self, message: str) -> NoReturn:
        """Usage and message on standard error; exit code 3."""
        self.print_usage(sys.stderr)
        self.exit(BAD_INPUT, f"{self.prog}: {message}\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="refimpl", description="An executable specification of DeepSeek-V3.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for add in (_add_diff, _add_info, _add_trace, _add_record, _add_case, _add_precision):
        add(commands)
    plan_cli.add_parsers(commands)
    return parser


def _add_diff(commands: Any) -> None:
    raw = argparse.RawDescriptionHelpFormatter
    diff = commands.add_parser(
        "diff", help="judge another implementation's trace", description=_DIFF, formatter_class=raw
    )
    diff.add_argument("case", type=Path)
    diff.add_argument("candidate", type=Path)
    diff.add_argument("--all", action="store_true", help="list every tap in model order")
    diff.add_argument("--quiet", action="store_true", help="print the verdict only")
    diff.add_argument("--json", action="store_true", help="print JSON (schema refimpl-diff/1)")
    diff.set_defaults(run=_diff)


def _add_info(commands: Any) -> None:
    info = commands.add_parser("info", help="what a checkpoint holds, misses, has too much (exit code 1 if so)")
    info.add_argument("checkpoint", help="a safetensors file, a folder, or the name of a preset such as deepseek-v3")
    info.add_argument("--json", action="store_true", help="print JSON")
    info.add_argument("--scan", action="store_true", help="also read every tensor and report NaN and infinity")
    info.set_defaults(run=_info)


def _add_trace(commands: Any) -> None:
    trace = commands.add_parser("trace", help="record the specification's own run of a case")
    trace.add_argument("case", type=Path)
    trace.add_argument("-o", "--out", type=Path, required=True)
    trace.add_argument("--precision", default="float32", help="float64, float32, bf16 or fp8 (default: float32)")
    trace.add_argument("--attend", default="expanded", choices=["expanded", "absorbed"])
    trace.add_argument("--taps", default="*", help="patterns, comma-separated (default: all), e.g. 'fwd/L*/router.*'")
    trace.set_defaults(run=_trace)


def _add_record(commands: Any) -> None:
    record = commands.add_parser("record", help="record another implementation's run of a case")
    record.add_argument("framework", choices=["hf"], help="hf: Hugging Face transformers (needs the extra 'interop')")
    record.add_argument("case", type=Path, nargs="?")
    record.add_argument("-o", "--out", type=Path)
    record.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    record.add_argument("--bug", help="inject a known bug of the corpus, e.g. R01; 'list' prints them")
    record.set_defaults(run=_record)


def _add_case(commands: Any) -> None:
    case = commands.add_parser("case", help="write a small case with random weights to run on both sides")
    case.add_argument("out", type=Path)
    case.add_argument("--preset", default="tiny", help="tiny or mini")
    case.add_argument("--config", type=Path, help="a config.json instead of a preset")
    case.add_argument("--seed", type=int, default=0, help="a natural number; the same seed writes the same files")
    case.set_defaults(run=_case)


def _add_precision(commands: Any) -> None:
    precision = commands.add_parser(
        "precision", help="print a precision plan: what is rounded, and how, stage by stage"
    )
    precision.add_argument(
        "plan", nargs="?", default="fp8", help="float64, float32, bf16, fp8, fp8_hopper or fp8_ue8m0 (default: fp8)"
    )
    precision.set_defaults(run=_precision)


def _precision(args: argparse.Namespace) -> int:
    from refimpl.layers.precision import describe, plan

    print("\n".join(describe(plan(args.plan))))
    return 0


def _diff(args: argparse.Namespace) -> int:
    from refimpl.diff.case import Case
    from refimpl.diff.judge import judge
    from refimpl.diff.report import render, summary, to_json
    from refimpl.diff.trace import Trace

    judgement = judge(Case.read(args.case), Trace.read(args.candidate), track=_progress("replaying"))
    text = (
        to_json(judgement)
        if args.json
        else summary(judgement)
        if args.quiet
        else render(judgement, everything=args.all)
    )
    print(text)
    return judgement.exit_code


def _progress(what: str) -> Callable[[list[Any]], Iterable[Any]]:
    """A progress bar on standard error if a person is watching, nothing otherwise."""
    if not sys.stderr.isatty():
        return iter

    def track(items: list[Any]) -> Iterable[Any]:
        from rich.console import Console
        from rich.progress import track

        return track(items, what, console=Console(stderr=True), transient=True)

    return track


def _count_on_stderr(done: int, total: int, name: str) -> None:
    print(f"\r{done + 1} of {total} {name:<70.70}", end="" if done + 1 < total else "\n", file=sys.stderr, flush=True)


def _info(args: argparse.Namespace) -> int:
    from refimpl.info import count_parameters, describe, render, render_counts, to_json
    from refimpl.layers import PRESETS

    if args.checkpoint in PRESETS and not Path(args.checkpoint).exists():
        print("\n".join(render_counts(count_parameters(PRESETS[args.checkpoint]))))
        return 0
    info = describe(args.checkpoint, scan=args.scan, progress=_count_on_stderr if sys.stderr.isatty() else None)
    print(to_json(info) if args.json else render(info))
    return 0 if info.ok else 1


def _trace(args: argparse.Namespace) -> int:
    from refimpl.diff.case import Case
    from refimpl.diff.ours import trace_case

    options = {"precision": args.precision, "attend": args.attend, "taps": args.taps.split(",")}
    trace = trace_case(Case.read(args.case), **options)
    trace.write(args.out)
    print(f"{args.out}: {len(trace.taps)} taps")
    return 0


def _record(args: argparse.Namespace) -> int:
    from refimpl.diff import hf
    from refimpl.diff.hf_bugs import BUGS

    if args.bug == "list":
        print("\n".join(f"{name}  {bug.description}" for name, bug in BUGS.items()))
        return 0
    if args.case is None or args.out is None:
        raise SpecError("record needs CASE and -o OUT")
    path = hf.record(args.case, args.out, dtype=args.dtype, patch=args.bug)
    print(path)
    return 0


def _case(args: argparse.Namespace) -> int:
    from refimpl.diff.make_case import new_case
    from refimpl.layers import PRESETS, Config
    from refimpl.shards import json_object

    if args.config is None and args.preset not in PRESETS:
        raise SpecError(f"preset {args.preset!r}; known: {', '.join(PRESETS)}")
    config = Config.from_dict(json_object(args.config)) if args.config else PRESETS[args.preset]
    if args.seed < 0:
        raise SpecError(f"--seed is {args.seed}; it must not be negative")
    if config.hidden_size * config.n_routed_experts > 1 << 18:
        raise SpecError("this model is too large to draw at random; give --config of a smaller one")
    new_case(args.out, config, seed=args.seed)
    print(args.out)
    return 0
