"""`refimpl eplb`: plan redundant experts by the published algorithm, draw the plan, judge anybody's maps."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .common import Commands, deliver

if TYPE_CHECKING:
    from refimpl.parallel_emulation.eplb_check import Finding, Verdict

_TEXT = """Where redundant experts go (R 3.4), by deepseek-ai/EPLB's algorithm, from a file of loads.

LOADS: .npy, .csv (a line a layer) or .json, layers x experts; SGLang's logical_count is read too. V3's prefill unit:

  refimpl eplb loads.json --gpus 32 --nodes 4 --groups 8 --slots 288 --out plan.json --json
  refimpl eplb loads.json --gpus 32 --nodes 4 --groups 8 --check plan.json

Prints max / mean of the GPUs' loads per layer: experts in order, as planned, and the least that any maps of so many
slots could reach; then one layer drawn, experts down and GPUs across.

--check MAPS judges phy2log, log2phy, logcnt and per-rank expert maps (.json or .npz; also SGLang's and vLLM's names, and
vLLM-Ascend's layer_list): every slot filled, maps inverse, no slot past the last, counts right; says where replicas of one
expert share a GPU or a node, and how near the balance comes to the published algorithm's and to the bound.

exit code: 0; 1 if --check finds a fault (or, with --slack, a worse balance); 3 bad input"""
_LINES = 20


def add(commands: Commands) -> None:
    """Add `eplb`."""
    raw = argparse.RawDescriptionHelpFormatter
    p = commands.add_parser(
        "eplb", help="plan redundant experts, or judge maps", description=_TEXT, formatter_class=raw
    )
    p.add_argument("loads", type=Path, metavar="LOADS", help="tokens of each expert, layers x experts")
    p.add_argument("--gpus", type=int, required=True, help="GPUs of the unit")
    p.add_argument("--slots", type=int, help="experts that all GPUs hold together (default: no more than needed)")
    p.add_argument(
        "--nodes", type=int, default=1, help="nodes; if they divide the groups, a group stays on one (default 1)"
    )
    p.add_argument("--groups", type=int, default=1, help="groups of the node-limited gate (default 1)")
    p.add_argument("--check", type=Path, metavar="MAPS", help="judge the maps in MAPS instead of planning")
    p.add_argument(
        "--slack", type=float, help="with --check: balance may be worse than the published by this part, as 0.05"
    )
    p.add_argument("--layer", type=int, help="the layer to draw (default: the one that is worst without a plan)")
    p.add_argument("--rows", type=int, default=16, help="experts to draw as text, the heaviest (default 16)")
    p.add_argument("--svg", type=Path, metavar="FILE", help="write the drawing of all experts as SVG")
    p.add_argument(
        "--json", action="store_true", help="maps and balance as JSON (refimpl-eplb/1, refimpl-eplb-check/1)"
    )
    p.add_argument("-o", "--out", type=Path, help="write to a file instead of standard output")
    p.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """The command; returns its exit code."""
    from refimpl.autograd.errors import require, where
    from refimpl.parallel_emulation.eplb import rebalance_experts
    from refimpl.parallel_emulation.eplb_files import read_loads

    loads = read_loads(args.loads)
    require(args.layer is None or 0 <= args.layer < len(loads), f"--layer {args.layer}; the loads have {len(loads)}")
    require(args.rows >= 1, f"--rows {args.rows}; expected at least 1")
    require(args.gpus >= 1, f"--gpus {args.gpus}; expected at least 1")
    require(args.slack is None or bool(args.check), "--slack is for --check")
    slots = args.slots if args.slots is not None else -(-loads.shape[1] // args.gpus) * args.gpus
    if args.check:
        return _check(args, loads)
    with where(f"in {args.loads}"):
        plan = rebalance_experts(loads, slots, args.groups, args.nodes, args.gpus)
    _plan(args, loads, plan)
    return 0


def _plan(args: argparse.Namespace, loads: Any, plan: Any) -> None:
    from refimpl.parallel_emulation import eplb_draw as draw

    balance = draw.summary(loads, plan, args.gpus)
    layer = args.layer if args.layer is not None else max(balance, key=lambda b: (b["before"], -b["layer"]))["layer"]
    row, slots = loads[int(layer)], plan.phy2log[int(layer)]
    panels = {"before": draw.matrix_in_order(row, args.gpus), "after": draw.matrix(row, slots, args.gpus)}
    if args.svg:
        deliver(
            draw.svg(panels, f"layer {layer}: {loads.shape[1]} experts in {len(slots)} slots"), args.svg, quiet=True
        )
    if args.json:
        told = {"schema": "refimpl-eplb/1", "gpus": args.gpus, "nodes": args.nodes, "groups": args.groups}
        maps = {name: a.tolist() for name, a in plan._asdict().items()}
        deliver(json.dumps(told | {"slots": len(slots), "balance": balance} | maps), args.out)
        return
    lines = ["layer    before     after     bound   (max / mean of the GPUs' loads)"]
    lines += [f"{b['layer']:<5}{b['before']:>10.3f}{b['after']:>10.3f}{b['bound']:>10.3f}" for b in balance]
    deliver("\n".join([*lines, "", f"layer {layer}", draw.text(panels, args.rows)]), args.out)


def _check(args: argparse.Namespace, loads: Any) -> int:
    from refimpl.autograd.errors import require
    from refimpl.parallel_emulation import eplb_draw as draw
    from refimpl.parallel_emulation.eplb import rebalance_experts
    from refimpl.parallel_emulation.eplb_check import check_maps
    from refimpl.parallel_emulation.eplb_files import read_maps

    sizes = {"num_nodes": args.nodes, "num_groups": args.groups}
    verdict = check_maps(loads, read_maps(args.check), args.gpus, num_replicas=args.slots, slack=args.slack, **sizes)
    if args.svg:
        require(verdict.reached is not None, "--svg: the maps are too broken to be drawn")
        ours = rebalance_experts(loads, verdict.phy2log.shape[1], args.groups, args.nodes, args.gpus)
        n = args.layer or 0
        both = {"published": ours.phy2log[n], str(args.check.name): verdict.phy2log[n]}
        panels = {name: draw.matrix(loads[n], slots, args.gpus) for name, slots in both.items()}
        deliver(draw.svg(panels, f"layer {n}"), args.svg, quiet=True)
    deliver(json.dumps(_told(verdict)) if args.json else _report(args.check, verdict), args.out)
    return 0 if verdict.good else 1


def _told(v: Verdict) -> dict[str, Any]:
    numbers = {"reached": v.reached, "published": v.published, "bound": v.bound}
    return {
        "schema": "refimpl-eplb-check/1",
        "good": v.good,
        "slots": int(v.phy2log.shape[1]),
        "faults": [f._asdict() for f in v.faults],
        "remarks": [f._asdict() for f in v.remarks],
        "balance": {name: None if a is None or a[0] != a[0] else a.tolist() for name, a in numbers.items()},
    }


def _report(path: Path, v: Verdict) -> str:
    lines = [*_listed("fault", v.faults), *_listed("remark", v.remarks)]
    if v.reached is not None and v.published is not None:
        lines.append("layer     these published     bound   (max / mean of the GPUs' loads)")
        rows = zip(v.reached, v.published, v.bound, strict=True)
        lines += [f"{n:<5}{a:>10.3f}{b:>10.3f}{c:>10.3f}" for n, (a, b, c) in enumerate(rows)]
    verdict = "the maps can be used" if v.good else f"{sum(f.times for f in v.faults)} faults"
    return "\n".join([*lines, f"{path}: {verdict}"])


def _listed(kind: str, found: list[Finding]) -> list[str]:
    lines = [
        f"{kind}: layer {f.layer}: {f.rule}: {f.text}" + (f", and {f.times - 1} more" if f.times > 1 else "")
        for f in found[:_LINES]
    ]
    return lines + ([f"{kind}: and {len(found) - _LINES} more (--json lists all)"] if len(found) > _LINES else [])
