"""Every entry of the matrix by id: bugs, of which some are those of `refimpl record hf --bug`, and innocent rewrites."""

from __future__ import annotations

from contextlib import nullcontext

import bugs_attention
import bugs_other
import bugs_router
from entries import Entry, innocent
from innocents import INNOCENTS

from refimpl.record.hf_bugs import BUGS as SHIPPED

_OWN = tuple([Entry(b.id, b.description, b.patch, frozenset({b.stage})) for b in SHIPPED.values()])
_CLEAN = innocent("clean", "transformers as it is", lambda model: nullcontext())
ENTRIES: dict[str, Entry] = {
    e.id: e for e in (_CLEAN, *_OWN, *bugs_router.BUGS, *bugs_attention.BUGS, *bugs_other.BUGS, *INNOCENTS)
}
