"""transformers' DeepseekV3ForCausalLM as an implementation to test, in float32 with eager attention."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import numpy as np

from refimpl.autograd.tensor import Array
from refimpl.diff import Case, Trace
from refimpl.record import hf, hf_gradients
from refimpl.record.hf_load import load_model
from refimpl.record.hf_run import Batch, run_batch, run_on
from refimpl.record.torch_arrays import libraries, one_thread, to_numpy

from .engine import Cache, Engine, without_codes


class Impl(Engine):
    """Loads as transformers does: of weights that are missing or too many it warns."""

    package = "transformers"
    layouts: ClassVar[Mapping[str, str]] = {"rope": "half", "mla": "expanded"}

    def make(self, case: Case) -> Any:
        """Without MTP layers, which transformers has not."""
        with one_thread():
            return load_model(case.raw_config, dict(without_codes(case).checkpoint), strict=False)

    def run(self, case: Case) -> Array:
        """One pass."""
        with one_thread():
            return to_numpy(run_batch(self.model, Batch(case.tokens, hf.positions_of(case), case.valid))[0])

    def more(self, tokens: Array, cache: Cache) -> Array:
        """On a DynamicCache."""
        with one_thread():
            return to_numpy(run_on(self.model, tokens.tolist(), cache))

    def watched(self, case: Case) -> Trace:
        """Its recorder's."""
        with one_thread():
            return hf.trace_of(self.model, case)

    def loss_and_grads(
        self, tokens: Any, labels: Any, taps: Iterable[str] = (), *, mtp_weight: float = 0.0, aux_weight: float = 0.0
    ) -> dict[str, Any]:
        """The loss that transformers makes of labels, and its gradients by weights."""
        if mtp_weight or aux_weight:
            raise NotImplementedError("the loss of MTP modules and the balance loss")
        assert self.held is not None
        torch, _ = libraries()
        case = self._case(*self.held, tokens)
        batch = Batch(case.tokens, hf.positions_of(case), labels=np.asarray(labels).tolist())
        with one_thread(), torch.enable_grad():
            _, loss = run_batch(self.model, batch)
            found = hf_gradients.gradients(self.model, loss, (), {})
        return {"loss": to_numpy(loss)} | {n: g for n, g in found.items() if n.startswith("grad/")}
