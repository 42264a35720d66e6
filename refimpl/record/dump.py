"""What a dump of any kind is to those who make a trace of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from refimpl.autograd.tensor import Array

from .tapmap import Part


@dataclass
class Dump:
    """find: the tensor that a part of a tap map names, or None. named: what is called by its tap. tokens: those of the run, if
    they are shown. precision_of: the dtype that a tensor's numbers are as good as, where that is not its own. notes: what could
    not be used. replicas: the dump as further ranks see it, which hold what all should hold.
    """

    find: Callable[[Part], Array | None]
    named: dict[str, Array] = field(default_factory=dict)
    tokens: Array | None = None
    precision_of: Callable[[Array], str] | None = None
    notes: list[str] = field(default_factory=list)
    replicas: list[Dump] = field(default_factory=list)

    def precision(self, taps: Mapping[str, Array]) -> dict[str, str]:
        """For the trace's header: the dtype of most taps, and of each tap whose numbers are only as good as another's."""
        floats = {t: x for t, x in taps.items() if x.dtype.kind not in "iub"}
        names = sorted(x.dtype.name for x in floats.values())
        most = max(names, key=names.count, default="float32")
        apart = {t: self.precision_of(x) for t, x in floats.items()} if self.precision_of else {}
        return {"storage": most, "accumulate": "float32", **apart}
