"""A tap map: where an implementation shows which tap, as a TOML file that says it in words a person can read too.

name = "my port"                 # package = the distribution whose version is compared with `tested`, if there is one
layer = "model.layers.i"         # what the places of a layer's taps are below; i is the layer's number
[taps]
"attn_norm" = "input_layernorm"                              # what a module gives
"mla.ctx" = "input of self_attn.o_proj"                      # what goes into it; `input 1 of`, `input mask of`
"router.ids" = "mlp.gate[1]"                                 # the second of its results, or the one of that name
"mla.k_rope" = "self_attn.rope #2"                           # its second call
"mla.probs" = "softmax in self_attn (B H S T)"               # a function called while a module runs; the axes recorded
"mlp.up" = "mlp.gate_up[..., F:]"                            # a slice of the last axis, e.g. F: or :Dn+Dr
"resid" = "model.layers.i[0] + model.layers.i[1]"            # a sum; cat(a, b) along the last axis
"ffn_out" = "moe | feed_forward"                             # the first of these that is seen
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

from refimpl.autograd.errors import SpecError, require, where
from refimpl.diff.names import Framework, frameworks, shipped
from refimpl.layers.stage import STAGES

_PART = re.compile(
    r"(?P<side>input(?: (?P<arg>\w+))? of )?(?:(?P<function>\w+) in )?(?P<path>[\w.-]+)"
    r"(?: #(?P<nth>[1-9]\d*))?(?:\[(?P<item>\w+)\])?(?:\[\.\.\., (?P<low>[\w+]*):(?P<high>[\w+]*)\])?"
)
_AXES = re.compile(r"(.*?)\s*\(([A-Z1-9][\w+ /-]*)\)")
_LETTERS = ["B", "S", "T", "D", "V", "H", "Dn", "Dr", "Dv", "C", "Q", "F", "E", "G", "K", "M"]
_LAYER = re.compile(r"(?<!\w)i(?!\w)")


@dataclass(frozen=True)
class Part:
    """One recorded tensor: what a module, or a function while a module runs, was given or gives at its nth call."""

    path: str
    function: str = ""
    nth: int = 1
    input: bool = False
    arg: str = "0"
    item: str = ""
    cut: tuple[str, str] = ("", "")


@dataclass(frozen=True)
class Place:
    """A tap as one tensor, or as the sum or concatenation of several, with its axes as recorded ("" where shapes tell)."""

    text: str
    parts: tuple[Part, ...]
    join: Literal["sum", "cat"] = "sum"
    axes: str = ""


def shipped_text(name: str) -> str:
    """The text of a map that is shipped. SpecError for a name that is none."""
    known = sorted(f.key for f in frameworks())
    require(name.removesuffix(".toml") in known, f"{name!r} is no shipped map; there are {', '.join(known)}")
    return shipped(name.removesuffix(".toml"))


def read(name: str) -> Framework:
    """A map that is shipped, by its file's name with or without .toml, or a map file. SpecError for what is neither."""
    known = {f.key: f for f in frameworks()}
    if name.removesuffix(".toml") in known and not Path(name).exists():
        return known[name.removesuffix(".toml")]
    with where(f"while reading tap map {name}"):
        try:
            text = Path(name).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise SpecError(f"cannot be read: {error}; shipped are {', '.join(sorted(known))}") from None
        return parsed(text, Path(name).stem)


def parsed(text: str, key: str) -> Framework:
    """The map that a TOML text is. SpecError for unknown keys and taps, and places that cannot be read."""
    try:
        d = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise SpecError(f"not TOML: {error}") from None
    kinds = {f.name: str(f.type).partition("[")[0] for f in fields(Framework)}
    unknown = sorted(set(d) - set(kinds) | {"key"} & set(d))
    require(not unknown, f"unknown keys: {', '.join(unknown)}; known: {', '.join(k for k in kinds if k != 'key')}")
    for key_, value in d.items():
        kind = {"dict": dict, "list": list, "str": str}[kinds[key_]]
        texts = value if isinstance(value, list) else value.values() if isinstance(value, dict) else []
        good = isinstance(value, kind) and all(isinstance(v, str) for v in texts)
        require(
            good,
            f"{key_} is {value!r}; expected a {kind.__name__} of texts" if kind is not str else f"{key_} is not a text",
        )
    require(d.get("taps"), "no [taps]")
    found = Framework(**{"name": key, **d}, key=key)
    known = {s.tap for s in STAGES.values()}
    for tap, entry in found.taps.items():
        require(tap in known, f"{tap!r} is no tap; `refimpl taps` lists them")
        with where(f"in the entry of {tap!r}"):
            places(entry)
    return found


def places(entry: str) -> list[Place]:
    """The alternatives of an entry, in order."""
    return [_place(text.strip()) for text in entry.split(" | ")]


def _place(text: str) -> Place:
    named = _AXES.fullmatch(text)
    body, axes = (named[1], named[2]) if named else (text, "")
    cat = re.fullmatch(r"cat\((.*)\)", body)
    parts = tuple([_part(p.strip()) for p in (re.split(r",\s*(?![^\[]*\])", cat[1]) if cat else body.split(" + "))])
    return Place(text, parts, "cat" if cat else "sum", axes)


def _part(text: str) -> Part:
    m = _PART.fullmatch(text)
    examples = "`norm`, `input of w2`, `gate[1]`, `rope #2`, `softmax in attn`, `fc1[..., :F]`"
    require(m, f"{text!r} is not a place; expected e.g. {examples}")
    assert m
    low, high = m["low"] or "", m["high"] or ""
    unknown = [t for t in re.findall(r"[A-Za-z]\w*", f"{low} {high}") if t not in _LETTERS]
    require(not unknown, f"{text!r}: no axis is called {', '.join(unknown)}; there are {', '.join(_LETTERS)}")
    nth, arg = int(m["nth"] or 1), m["arg"] or "0"
    return Part(m["path"], m["function"] or "", nth, bool(m["side"]), arg, m["item"] or "", (low, high))


def at_layer(path: str, below: str, i: int | None) -> str:
    """A place's path in the model: below the layer's path, unless it names the layer itself; i put in."""
    if i is None:
        return path
    whole = path if _LAYER.search(path) or not below else f"{below}.{path}"
    return _LAYER.sub(str(i), whole)


def untested(map_: Framework, version: str) -> str:
    """A warning if a version is none of those that the map was tested with; "" otherwise, and for a map of the user's own that
    speaks of no versions.
    """
    if any(version == t or version.startswith(t + ".") for t in map_.tested):
        return ""
    if not map_.tested and map_ not in frameworks():
        return ""
    never = map_.trial or "never run: its names are read from source"
    tried = f"tested with {', '.join(map_.tested)}" if map_.tested else never
    return f"warning: {map_.package or map_.name} {version or '(version unknown)'}: the map {map_.key} was {tried}"


def used(map_: Framework, taps: Iterable[str]) -> dict[str, list[Place]]:
    """Those of the map's entries that are among these taps."""
    return {tap: places(map_.taps[tap]) for tap in taps if tap in map_.taps}
