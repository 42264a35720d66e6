"""`refimpl serve`: OpenAI's completions and chat over HTTP, for other engines' clients and test suites."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from .common import Commands
from .engines import add_engine, limits_of, open_checkpoint, open_engine

if TYPE_CHECKING:
    from refimpl.checkpoint import Checkpoint
    from refimpl.infer.server import Bounds, Service

EXAMPLES = """examples:
  refimpl serve refimpl/cases/tiny
  curl http://127.0.0.1:8000/v1/completions -H 'Content-Type: application/json' \\
       -d '{"model": "tiny", "prompt": [3, 1, 4, 1, 5], "max_tokens": 8, "temperature": 0}'
  refimpl serve model/ --port 0 --invariant               (a free port; the same bits in any company)

An oracle, not a product: point another engine's client or test suite at it. It has /v1/completions, /v1/chat/completions,
/v1/models and /health; it speaks to this machine only unless --host says otherwise, and asks nobody for a key. The address
goes to standard output when it is ready. Ctrl-C ends it. Fields and limits: docs/serving.md."""


def add(commands: Commands) -> None:
    """Add `serve`."""
    p = commands.add_parser(
        "serve",
        help="answer OpenAI's completions and chat over HTTP",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("checkpoint", type=Path, help="a folder with config.json, weights and, for text, tokenizer.json")
    p.add_argument(
        "--host", default="127.0.0.1", help="the address to listen on (default: 127.0.0.1, this machine only)"
    )
    p.add_argument("--port", type=int, default=8000, help="0 takes a free one (default: 8000)")
    p.add_argument("--name", help="what clients call the model (default: the folder's name)")
    p.add_argument("--max-body", type=int, default=1 << 20, metavar="BYTES", help="of a request (default: 1048576)")
    p.add_argument("--max-tokens", type=int, default=4096, help="the most tokens of one answer (default: 4096)")
    p.add_argument(
        "--concurrency", type=int, default=128, help="answers written at a time; more get 429 (default: 128)"
    )
    p.add_argument(
        "--timeout", type=float, default=60, help="seconds until a client that neither sends nor reads is given up (60)"
    )
    add_engine(p)
    p.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """The command; returns its exit code."""
    from refimpl.infer.server import Bounds, check_libraries, create_server, listen

    check_libraries()
    bounds = Bounds(args.max_body, args.max_tokens, args.concurrency, args.timeout)
    limits_of(args)
    checkpoint, folder = open_checkpoint(args.checkpoint)
    with listen(args.host, args.port, bounds.seconds) as sock:
        service = _service(args, checkpoint, folder, bounds)
        server = create_server(service)
        host, port = sock.getsockname()[:2]
        print(f"{service.name} at http://{f'[{host}]' if ':' in host else host}:{port}/v1", flush=True)
        if not service.tokenizer:
            print("no tokenizer.json: prompts are ids, answers are token_ids", file=sys.stderr)
        server.run(sockets=[sock])
    return 0


def _service(args: argparse.Namespace, checkpoint: Checkpoint, folder: Path, bounds: Bounds) -> Service:
    from refimpl.infer import Tokenizer, eos_of
    from refimpl.infer.server import Service

    tokenizer = Tokenizer.open(folder) if (folder / "tokenizer.json").is_file() else None
    eos = eos_of(folder, checkpoint.config or {}) or (tokenizer.eos if tokenizer else ())
    name = args.name or folder.resolve().name
    return Service(name, open_engine(args, checkpoint), tokenizer, eos, bounds)
