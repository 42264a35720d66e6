"""Why an output has the bits it has: the steps of one dot product, every addend, and what each rule threw away."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray

from refimpl.autograd.errors import require
from refimpl.layers.numerics.formats import Format

from .machines import Machine, carrier
from .text import Codes, align, decode, operands, special, step


@dataclass(frozen=True)
class Addend:
    """One product, or the accumulator (k None): exact value x, its exponent e, and x = (t + what is cut) * quantum."""

    k: int | None
    x: Fraction
    e: int
    t: int
    lost: Fraction

    def __str__(self) -> str:
        """`k 17    2.25  e 0 -> t 576, lost 0.001953125`"""
        name = "c     " if self.k is None else f"k {self.k:<4d}"
        cut = f", lost {float(self.lost):.9g}" if self.lost else ""
        return f"{name} {float(self.x):<16.9g} e {self.e:<4d} -> t {self.t}{cut}"


@dataclass(frozen=True)
class Step:
    """One instruction step: E, the addends, S = sum of their t, the code and value written, and what writing lost."""

    E: int
    quantum: Fraction
    addends: tuple[Addend, ...]
    S: int
    code: int
    value: float
    lost: Fraction
    special: str

    def __str__(self) -> str:
        """The addends that are not zero, one per line, between E and the sum."""
        if self.special:
            return f"  {self.special}: the result is {self.value}, 0x{self.code:x}"
        lines = [f"  E {self.E}, quantum {float(self.quantum):.9g}", *(f"    {x}" for x in self.addends if x.x)]
        zeros = sum(not x.x for x in self.addends)
        cut = f", {float(self.lost):.9g} lost" if self.lost else ""
        lines += [f"    ({zeros} addends are zero)"] if zeros else []
        return "\n".join([*lines, f"    S {self.S} -> {self.value:.9g} (0x{self.code:x}){cut}"])


@dataclass(frozen=True)
class Why:
    """d[m, n] step by step; `exact` is the true sum, `aligned` and `written` what rules 4 and 6 lost of it, signed."""

    title: str
    steps: tuple[Step, ...]
    exact: Fraction
    aligned: Fraction
    written: Fraction

    def __str__(self) -> str:
        """The explanation, for reading."""
        last = self.steps[-1]
        head = [f"{self.title} = {last.value:.9g} (0x{last.code:x})"]
        if not any(s.special for s in self.steps):
            parts = f"{float(self.aligned):.9g} lost in alignment, {float(self.written):.9g} in writing"
            head.append(f"exact sum {float(self.exact):.17g}: {parts}")
        return "\n".join([*head, *(f"step {i}\n{s}" for i, s in enumerate(self.steps))])


def why(a: Codes, b: Codes, c: NDArray[Any], m: int, n: int, *, arch: str, fmt: str) -> Why:
    """Explain d[m, n] of `tensor_core_matmul`.  a (M, K), b (N, K), c (M, N).

    Raises SpecError as `tensor_core_matmul` does, and for an index outside the result. `print(why(...))` reads well.
    """
    machine, a, b, c = operands(a, b, c, arch, fmt)
    inside = c.ndim == 2 and 0 <= m < c.shape[0] and 0 <= n < c.shape[1]
    require(inside, f"d[{m}, {n}] of a result of shape {c.shape}; expected an index into a matrix")
    code, steps = c.view(carrier(machine.out.format))[m, n], []
    start = _value(code, machine.out.format)
    for k in range(0, a.shape[1], machine.L):
        steps.append(_step(a[m, k : k + machine.L], b[n, k : k + machine.L], code, k, machine))
        code = carrier(machine.out.format).type(steps[-1].code)
    products = sum((x.x for s in steps for x in s.addends if x.k is not None), Fraction(0))
    aligned = sum((x.lost for s in steps for x in s.addends), Fraction(0))
    written = sum((s.lost for s in steps), Fraction(0))
    title = f"d[{m}, {n}] on {arch} {fmt} (F {machine.F}, {machine.L} products a step)"
    return Why(title, tuple(steps), start + products, aligned, written)


def _step(a: Codes, b: Codes, c: Any, k: int, machine: Machine) -> Step:
    """One step of one output: codes a, b (L,), c one code."""
    t, tc, e = (x.tolist() for x in align(a, b, np.asarray(c), machine))
    quantum = Fraction(2) ** (e - machine.F)
    (_, ea), (_, eb), (_, ec) = (decode(x, f) for x, f in _operands(a, b, c, machine))
    products = [_value(x, machine.format) * _value(y, machine.format) for x, y in zip(a, b, strict=True)]
    exponents = [*(ea + eb).tolist(), int(ec)]
    values, shifted = [*products, _value(c, machine.out.format)], [*t, tc]
    names = [*range(k, k + len(a)), None]
    rows = zip(names, values, exponents, shifted, strict=True)
    addends = tuple(Addend(i, x, ex, s, x - s * quantum) for i, x, ex, s in rows)
    code = step(a, b, np.asarray(c), machine)
    value = float(code.view(f"f{code.itemsize}"))
    kind = float(special(a, b, np.asarray(c), machine))
    total = sum(shifted)
    lost = total * quantum - Fraction(value) if np.isfinite(value) else Fraction(0)
    says = "" if np.isfinite(kind) else "an operand or the accumulator is infinite or NaN"
    return Step(e, quantum, addends, total, int(code), value, lost, says)


def _operands(a: Codes, b: Codes, c: Any, machine: Machine) -> list[tuple[Codes, Format]]:
    return [(a, machine.format), (b, machine.format), (np.asarray(c), machine.out.format)]


def _value(code: Any, f: Format) -> Fraction:
    """The exact value of a code, as if the largest exponent field held numbers."""
    significand, exponent = decode(np.asarray(code), f)
    return Fraction(int(significand)) * Fraction(2) ** (int(exponent) - f.mantissa)
