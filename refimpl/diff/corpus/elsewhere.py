"""Families of the corpus that no change of one stage of a forward pass can express, and where they show instead."""

_WEIGHTS = "a wrong weight: the weights gate"
_FP8 = "a wrong scale or block of FP8 weights: spec_tests/r3_3_fp8/test_fp8_bugs.py has it on the quantisers"
NOT_STAGES: dict[str, str] = {
    "R06": "router products in bfloat16: a dtype, named as such",
    "R11": "compensates an overflow of float16 in layers that need none: a factor in resid, fitted as a number",
    "R19": "ids of a dtype that cannot hold them: refused, or other ids",
    "R21": _WEIGHTS + ", or a shape",
    "R22": "a reference with the bug in it: no candidate",
    "A03": "DeepSeek-V3.2's indexer, which V3 has not",
    "A07": "a converter's factor: A04 or A05 where it shows",
    "A08": "A04 in one kernel only: A04 of that form of attention",
    "A15": "an odd rotary size: refused by the config",
    "A16": "an output layout that the next operation does not expect: a gauge, or another tap's values",
    "A19": "a short prefill run as decode: another form of attention, which is judged as such",
    "A21": "a scale of the cache on one side only: a factor in cache.c_kv or mla.ctx, fitted as a number",
    "A22": "reports of one cache's path without a common cause",
    **{f"F{i:02d}": _FP8 for i in (*range(1, 8), 10)},
    "F14": "F12 in a test of the kernel alone",
    "F15": "a backward product of FP8: a factor in bwd/*, fitted as a number",
    "T02": "a contested point: Dialect.mtp_hidden",
    "T04": "positions of MTP not cut: mtp.positions is compared exactly",
    "T06": "labels that should be ignored: the header's labels, or another loss.mtp",
    "T07": "the main output changes with MTP on: two traces",
    "L08": "a list of bugs between ranks",
}
"""id -> why, and where it shows."""
