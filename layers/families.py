"""Which `config.json` is one of a model of this specification: by its `model_type` and `architectures`, and by its keys.

DeepSeek-V3, V3-0324, R1, V3.1 and Moonlight are of type deepseek_v3, V2 and V2-Lite deepseek_v2, Kimi-K2 kimi_k2 with V3's class.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from refimpl.autograd.errors import require

FAMILIES = ("deepseek_v2", "deepseek_v3", "kimi_k2")
"""Values of `model_type` whose models compute what this specification says."""
_CLASS = re.compile(r"DeepSeekV[23](?!\d)|KimiK2(?!\d)", re.IGNORECASE)
_OWN = ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "n_routed_experts")
"""Keys that every config of these families has, and few others."""
_EXPECTED = f"expected a config.json of the families {', '.join(FAMILIES)}"


def check_family(d: Mapping[str, Any]) -> None:
    """SpecError for a config that says it is of another family; one that says nothing may be of ours."""
    kind, classes = d.get("model_type"), d.get("architectures") or []
    named = isinstance(classes, list) and all(isinstance(c, str) for c in classes)
    require(named, f"architectures is {classes!r}; expected a list of names")
    ours = any(_CLASS.match(c) for c in classes)
    require(not classes or ours, f"architectures is {', '.join(classes)}; {_EXPECTED}")
    require(kind is None or ours or kind in FAMILIES, f"model_type is {kind!r}; {_EXPECTED}")


def check_described(d: Mapping[str, Any]) -> None:
    """SpecError for a file that describes no model of these families, which defaults would make DeepSeek-V3."""
    check_family(d)
    known = d.get("model_type") in FAMILIES or any(k in d for k in _OWN)
    require(known, f"no model_type, and none of {', '.join(_OWN)}; {_EXPECTED}")
