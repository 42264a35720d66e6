"""`refimpl record`: record another implementation's run of a case."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from refimpl.autograd.errors import SpecError

from .common import Commands, deliver

if TYPE_CHECKING:
    from refimpl.record.candidate import Recorded

_TEXT = """Record another implementation's run of a case as a trace that `refimpl diff` judges.

  refimpl record hf        CASE -o out.safetensors                      transformers' DeepSeek-V3, every tap
  refimpl record torch     CASE -o out.safetensors --map torchtitan     any torch module, through a tap map
  refimpl record mlx       CASE -o out.safetensors                      mlx-lm on its CPU backend
  refimpl record llamacpp  CASE -o out.safetensors                      llama.cpp, through a GGUF made of the case
  refimpl record import    CASE -o out.safetensors --from DUMP          what a debugger of theirs has written
  refimpl record tap-file  > refimpl_tap.py                             one file to paste into any other program

docs/recording.md says how each sees what it sees. `refimpl record FRAMEWORK --help` tells more."""


def add(commands: Commands) -> None:
    """Add `record`."""
    raw = argparse.RawDescriptionHelpFormatter
    text = "record another implementation's run of a case"
    record = commands.add_parser("record", help=text, description=_TEXT, formatter_class=raw)
    frameworks = record.add_subparsers(required=True, metavar="FRAMEWORK")
    _add_hf(frameworks)
    _add_torch(frameworks)
    _add_mlx(frameworks)
    _add_llamacpp(frameworks)
    _add_import(frameworks)
    _add_tap_file(frameworks)


def run(args: argparse.Namespace) -> int:
    """The command; returns its exit code."""
    code: int = args.record(args)
    return code


def _framework(
    frameworks: Commands, name: str, text: str, run_it: Any, *, needed: bool = True
) -> argparse.ArgumentParser:
    p: argparse.ArgumentParser = frameworks.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
    p.add_argument("case", type=Path, nargs=None if needed else "?", help="a case folder")
    p.add_argument("-o", "--out", type=Path, required=needed, metavar="TRACE", help="the trace to write")
    p.set_defaults(run=run, record=run_it)
    return p


def _said(done: Recorded) -> int:
    """The trace's path on standard output, its notes on standard error."""
    for note in done.notes:
        print(f"refimpl: {note}", file=sys.stderr)
    print(done.path)
    return 0


# ---- The frameworks


def _add_hf(frameworks: Commands) -> None:
    p = _framework(frameworks, "hf", "Hugging Face transformers (extra 'interop')", _hf, needed=False)
    p.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    p.add_argument(
        "--attention",
        default="eager",
        choices=["eager", "sdpa", "flex_attention"],
        help="attention kernel; eager shows scores and weights",
    )
    p.add_argument("--experts", default="eager", choices=["eager", "batched_mm", "grouped_mm"], help="expert kernel")
    p.add_argument(
        "--phases",
        default="fwd",
        help="in which parts to run it: fwd,dec20,dec21 is 20 tokens, then one on their cache, then the rest",
    )
    p.add_argument("--gradients", action="store_true", help="record the gradients of the next-token loss too")
    p.add_argument(
        "--model",
        metavar="PKG.MOD:CLASS",
        help="your own modelling file, also as a path, modeling_mine.py:Class; its code is run",
    )
    p.add_argument("--bug", help="inject a known bug of the corpus, e.g. R01; 'list' prints them")


def _hf(args: argparse.Namespace) -> int:
    from refimpl.diff import Trace
    from refimpl.record import hf
    from refimpl.record.candidate import Recorded
    from refimpl.record.hf_bugs import BUGS

    if args.bug == "list":
        print("\n".join(f"{name}  {bug.description}" for name, bug in BUGS.items()))
        return 0
    if args.case is None or args.out is None:
        raise SpecError("record needs CASE and -o OUT")
    path = hf.record(
        args.case,
        args.out,
        dtype=args.dtype,
        patch=args.bug,
        attention=args.attention,
        experts=args.experts,
        phases=args.phases.split(","),
        gradients=args.gradients,
        model=args.model,
    )
    return _said(Recorded(path, tuple(Trace.read(path).header.notes.split("; "))))


def _add_torch(frameworks: Commands) -> None:
    p = _framework(frameworks, "torch", "any torch module, through a tap map (extra 'torch')", _torch)
    p.add_argument("--map", required=True, help="a tap map: a TOML file, or a name that `refimpl map list` prints")
    p.add_argument(
        "--build", metavar="PKG.MOD:FN", help="function of the case that returns the model; shipped maps know theirs"
    )


def _torch(args: argparse.Namespace) -> int:
    from refimpl.record import torch_map

    return _said(torch_map.record(args.case, args.out, map_name=args.map, build=args.build))


def _add_mlx(frameworks: Commands) -> None:
    _framework(frameworks, "mlx", "mlx-lm's deepseek_v3 on MLX's CPU backend, in float32 (extra 'mlx')", _mlx)


def _mlx(args: argparse.Namespace) -> int:
    from refimpl.record import mlx

    return _said(mlx.record(args.case, args.out))


def _add_llamacpp(frameworks: Commands) -> None:
    p = _framework(frameworks, "llamacpp", "llama.cpp through llama-cpp-python (extra 'llamacpp')", _llamacpp)
    p.add_argument(
        "--gguf", type=Path, metavar="FILE", help="the case's model as a GGUF file; without it one is made, in float32"
    )


def _llamacpp(args: argparse.Namespace) -> int:
    from refimpl.record import llamacpp

    return _said(llamacpp.record(args.case, args.out, gguf=args.gguf))


def _add_import(frameworks: Commands) -> None:
    text = "what SGLang's dumper, transformers' model-addition debugger or llama.cpp's eval-callback has written"
    p = _framework(frameworks, "import", text, _import)
    p.add_argument(
        "--from", dest="source", type=Path, required=True, metavar="DUMP", help="the dump's folder, or its text"
    )
    p.add_argument("--map", help="the tap map its names are read by; each kind of dump has its own")


def _import(args: argparse.Namespace) -> int:
    from refimpl.record import dumps

    return _said(dumps.record(args.case, args.out, source=args.source, map_name=args.map))


def _add_tap_file(frameworks: Commands) -> None:
    text = (
        "print refimpl_tap.py, a file of NumPy alone to paste into any program: its `tap` and `recording` write a trace"
    )
    p = frameworks.add_parser("tap-file", help=text, description=f"{text[0].upper()}{text[1:]}.")
    p.add_argument("-o", "--out", type=Path, metavar="FILE", help="write it there instead")
    p.set_defaults(run=run, record=_tap_file)


def _tap_file(args: argparse.Namespace) -> int:
    from importlib import resources

    deliver(resources.files("refimpl.record").joinpath("refimpl_tap.py").read_text(encoding="utf-8"), args.out)
    return 0
