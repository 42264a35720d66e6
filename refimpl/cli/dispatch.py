"""The command line. Results go to standard output, everything else to standard error; exit codes are part of the
contract.
"""

from __future__ import annotations

import argparse
import errno
import os
import sys
import traceback
from collections.abc import Sequence
from typing import NoReturn

from refimpl.autograd.errors import SpecError

from . import (
    batch,
    case,
    cluster,
    conform,
    data,
    diff,
    eplb,
    explain,
    generate,
    impact,
    info,
    mutants,
    plot,
    precision,
    recipe,
    record,
    repro,
    run_layer,
    schedule,
    score,
    serve,
    taps,
    trace,
    train,
    vectors,
    weights,
)
from . import map as maps

BAD_INPUT = 3
INTERRUPTED = 130
INTERNAL = 70
COMMANDS = (
    *(diff, impact, explain, repro, conform, vectors, mutants, info, weights, score, case, record, maps, trace, taps),
    *(generate, run_layer, batch, serve, recipe, data, train, plot, precision, schedule, cluster, eplb),
)
"""The commands in the order of `--help`: each a module with `add` (its arguments) and `run`."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit code."""
    try:
        args = _parser().parse_args(argv)
        code: int = args.run(args)
        sys.stdout.flush()
    except SpecError as error:
        print(f"refimpl: {error}", file=sys.stderr)
        return BAD_INPUT
    except KeyboardInterrupt:
        print("refimpl: interrupted; nothing was left half-written", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        sys.stderr.close()
        return 0
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            return _bug()
        print(f"refimpl: cannot be written: {error.strerror}", file=sys.stderr)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what is left cannot be written at exit either
        return BAD_INPUT
    except Exception:  # Python's own exit code 1 would read as "diverges"
        return _bug()
    return code


def _bug() -> int:
    traceback.print_exc()
    print("refimpl: this is a bug of refimpl, not a verdict", file=sys.stderr)
    return INTERNAL


class _Parser(argparse.ArgumentParser):
    """argparse's own exit code 2 would read as "inconclusive"."""

    def error(self, message: str) -> NoReturn:
        """Usage and message on standard error; exit code 3."""
        self.print_usage(sys.stderr)
        self.exit(BAD_INPUT, f"{self.prog}: {message}\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="refimpl", description="An executable specification of DeepSeek-V3.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in COMMANDS:
        command.add(commands)
    return parser
