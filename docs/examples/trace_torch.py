"""A trace of a torch model by forward hooks: `python trace_torch.py CASE OUT`, then `refimpl diff CASE OUT`.

`TAPS` is the work: which module's output is which tap. Here for transformers; `refimpl map suggest` proposes such pairs.
"""

import sys
from functools import partial

from refimpl.diff import Case
from refimpl.record.build_transformers import build  # stands for your way to a model with the case's weights
from refimpl.record.refimpl_tap import recording, tap  # one file, NumPy only: paste it beside your model

TAPS = {"input_layernorm": "attn_norm", "self_attn": "attn_out", "mlp": "ffn_out"}


def keep(name, module, args, y):
    tap(name, y[0] if isinstance(y, tuple) else y)  # attention gives its output and its probabilities


case, out = sys.argv[1:]
tokens, mine = Case.read(case).tokens, build(Case.read(case))
for name, module in mine.module.named_modules():
    layer, _, rest = name.removeprefix("model.layers.").partition(".")
    if rest in TAPS:
        module.register_forward_hook(partial(keep, f"L{layer}/{TAPS[rest]}"))
with recording(out, case, producer="my port"):
    tap("logits", mine.call(mine.module, tokens))
