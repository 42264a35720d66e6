"""Rules that are almost Hopper's: each changes one detail. The data must tell every one of them from the real rule."""

from dataclasses import replace
from unittest.mock import patch

import numpy as np

from refimpl.layers.numerics.tensor_cores import MACHINES
from refimpl.layers.numerics.tensor_cores import text as tensor_core

HOPPER = MACHINES["hopper", "e4m3"]


def to_nearest(significand, shift):
    """Alignment that rounds to nearest, ties to even."""
    return np.rint(np.ldexp(significand.astype(np.float64), np.clip(shift, -200, 62))).astype(np.int64)


def to_floor(significand, shift):
    """Alignment by arithmetic shift of two's complement: toward minus infinity."""
    return (significand << np.clip(shift, 0, 62)) >> np.clip(-shift, 0, 62)


def of_renormalised_products(p, ep, mc, ec, floor):
    """E from products whose significand in [2, 4) is renormalised."""
    return REFERENCE(p, ep + (np.abs(p) >= 2 << 2 * HOPPER.format.mantissa), mc, ec, floor)


def with_zeros(p, ep, mc, ec, floor):
    """E from all addends, zeros too: a zero operand has the smallest exponent of its format."""
    return np.maximum(np.maximum(ep.max(axis=-1), ec), floor)


REFERENCE = tensor_core.reference_exponent
MACHINE = {
    "output to nearest": replace(HOPPER, out=replace(HOPPER.out, nearest=True)),
    "output in full float32": replace(HOPPER, out=replace(HOPPER.out, kept=23)),
    "no alignment loss": replace(HOPPER, F=34),
    "F 14": replace(HOPPER, F=14),
    "F 12": replace(HOPPER, F=12),
    "groups of 16": replace(HOPPER, L=16),
    "groups of 8": replace(HOPPER, L=8),
}
PATCH = {
    "alignment to nearest": ("truncate", to_nearest),
    "alignment to floor": ("truncate", to_floor),
    "products renormalised": ("reference_exponent", of_renormalised_products),
    "zeros take part": ("reference_exponent", with_zeros),
}
# Wrong outputs among 5,000 measured on an H100: Gaussian operands, no accumulator
ON_H100 = [
    ("alignment to nearest", 905),
    ("alignment to floor", 1030),
    ("output to nearest", 715),
    ("no alignment loss", 1085),
    ("F 14", 867),
    ("F 12", 1963),
    ("groups of 16", 814),
    ("groups of 8", 1264),
    ("output in full float32", 1415),
    ("products renormalised", 462),
]


def rows(mutant, a, b, c):
    """One dot product per row under the changed rule: codes (n, K), (n, K), accumulator bits (n,) -> bits (n,)."""
    if mutant in PATCH:
        name, changed = PATCH[mutant]
        with patch.object(tensor_core, name, changed):
            return tensor_core.chain(a, b, c, HOPPER)
    return tensor_core.chain(a, b, c, MACHINE.get(mutant, HOPPER))
