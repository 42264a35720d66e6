"""Whole explanations, word by word, as somebody read them: of numbers so round that no summation's order shows in them."""

import dataclasses
import functools
import math

import numpy as np
import pytest

from refimpl.diff import Case, Trace
from refimpl.diff.examined import examined
from refimpl.diff.explanation import explain_number
from refimpl.diff.judge import judge
from refimpl.layers import PRESETS
from refimpl.record import new_case, trace_case

from .test_diff_partial import case, recording

RECORDED = (
    *(
        "resid_mid",
        "router.choice",
        "router.groups",
        "router.ids",
        "router.weights",
        "shared.gate",
        "shared.up",
        "shared.act",
    ),
    *("moe.shared", "moe.down", "moe.routed", "ffn_out", "resid"),
)


@functools.cache
def judged():
    """A recording of layer 1 and the mask, whose numbers are quarters from -5/4 to 5/4, whatever they should be."""
    taps = {}
    for tap, a in recording("hf-float32").taps.items():
        if tap == "fwd/mask" or tap.removeprefix("fwd/L1/") in RECORDED:
            i = np.arange(np.size(a)).reshape(np.shape(a))
            taps[tap] = (
                np.asarray(a) if "mask" in tap or a.dtype.kind != "f" else ((i * 7 % 11 - 5) / 4).astype(np.float32)
            )
    return judge(case(), Trace(dataclasses.replace(recording("hf-float32").header, expected=[]), taps))


READ = {
    ("resid", (0, 5, 3)): """
fwd/L1/resid[0, 5, 3]: residual stream after the layer (R fig. 2)
  equation       x + y: the residual stream. x (B, S, D), y (B, S, D) -> (B, S, D).
  inputs         x = fwd/L1/resid_mid, y = fwd/L1/ffn_out
  float64        1
  candidate      0.5   difference -5.000e-01
  terms          2, of fwd/L1/resid_mid, fwd/L1/ffn_out: they sum to the number (apart by 0.0e+00)
                 +5.000000e-01    +50.0%  fwd/L1/resid_mid[0, 5, 3] = 0.5
                 +5.000000e-01    +50.0%  fwd/L1/ffn_out[0, 5, 3] = 0.5
  hint           the candidate's number is the sum without the term of fwd/L1/resid_mid[0, 5, 3]""",
    ("moe.shared", (0, 5, 3)): """
fwd/L1/moe.shared[0, 5, 3]: output of the shared experts (R eq 12, FFN^(s))
  equation       y = x wT (+ b). x (B, S, D), w (F, D), b (F,) or None -> (B, S, F).
  inputs         x = fwd/L1/shared.act, w = W.down_proj.weight
  float64        0.8366699219
  candidate      0.5   difference -3.367e-01
  terms          16, of fwd/L1/shared.act: they sum to the number (apart by 0.0e+00)
                 +5.883789e-01    +70.3%  fwd/L1/shared.act[0, 5, 11] = 1.25  x  W.down_proj.weight[3, 11] = 0.470703
                 +3.847656e-01    +46.0%  fwd/L1/shared.act[0, 5, 5] = -1  x  W.down_proj.weight[3, 5] = -0.384766
                 -1.364746e-01            the other 14 terms
  hint           the candidate's number is 0.597607 x ours""",
    ("moe.routed", (0, 5, 3)): """
fwd/L1/moe.routed[0, 5, 3]: weighted sum of the routed experts (R eq 12, the sum over routed experts)
  equation       sum_k g_k FFN_k(x), ascending expert id; without weights a plain sum. down (M, D), ids (B, S, K), weights \
(B, S, K) or None -> (B, S, D).
  inputs         down = fwd/L1/moe.down, ids = fwd/L1/router.ids, weights = fwd/L1/router.weights
  float64        -0.0625
  candidate      0.5   difference +5.625e-01
  terms          4, of fwd/L1/moe.down: they sum to the number (apart by 0.0e+00)
                 +6.250000e-01  -1000.0%  fwd/L1/moe.down[110, 3] = 1.25  x  fwd/L1/router.weights[0, 5, 3] = 0.5
                 -6.250000e-01  +1000.0%  fwd/L1/moe.down[126, 3] = 0.5  x  fwd/L1/router.weights[0, 5, 2] = -1.25
                 -6.250000e-02            the other 2 terms
  hint           the candidate's number is -8 x ours""",
    ("router.ids", (0, 5, 0)): """
fwd/L1/router.ids[0, 5, 0]: chosen experts (R eq 16)
  equation       The top-k experts among the kept groups, best first; others count as `fill`. a (B, S, E), kept (B, S, M) or None \
-> (B, S, K) int.
  inputs         a = fwd/L1/router.choice, kept = fwd/L1/router.groups
  settings       k=4, n_group=4, fill=-inf
  float64        [9, 11, 12, 14]
  candidate      [8, 11, 12, 15]
  margin         2.500e-01 between the last that is chosen and the first that is not
  scores         of fwd/L1/router.choice, largest first
                 +1.250000e+00     0                      not eligible
                 +1.250000e+00    11  float64  candidate
                 +1.000000e+00     3                      not eligible
                 +1.000000e+00    14  float64
                 +7.500000e-01     6                      not eligible
                 +5.000000e-01     9  float64
                 +2.500000e-01     1                      not eligible
                 +2.500000e-01    12  float64  candidate
                 +0.000000e+00     4                      not eligible
                 +0.000000e+00    15           candidate
                 -2.500000e-01     7                      not eligible
                 -5.000000e-01    10
                 -7.500000e-01     2                      not eligible
                 -7.500000e-01    13
                 -1.000000e+00     5                      not eligible
                 -1.250000e+00     8           candidate""",
    ("mask", (0, 0, 5, 3)): """
fwd/mask[0, 0, 5, 3]: additive attention mask: who may see whom (R 2.1.1 eq 10 (j <= t))
  equation       0 where query s may see key t, -inf elsewhere. positions (B, S), valid (B, T), documents (B, S), key_documents \
(B, T) -> (B, 1, S, T) with T = past + S.
  inputs         positions = positions, valid = none, documents = none, key_documents = none
  settings       past=0, dtype=float32
  float64        0
  candidate      0   difference +0.000e+00
  allowed        nothing: the number is exact
  depends on     no input's value, only on its place""",
    ("router.weights", (0, 5, 1)): """
fwd/L1/router.weights[0, 5, 1]: gating values g of the chosen experts (R eqs 12-13)
  equation       g_k = scale s_k / sum over the selected s, from the unbiased scores. s (B, S, E), ids (B, S, K) -> (B, S, K).
  inputs         s = fwd/L1/router.scores, ids = fwd/L1/router.ids
  settings       normalise=True, eps=1e-20, scale=2.5
  region         4 stages that were not recorded apart: ... L1/ffn_norm, L1/router.logits, L1/router.scores, itself
  float64        0.6653367431
  candidate      -0.25   difference -9.153e-01
  first order    of W.mlp.gate.weight, fwd/L1/resid_mid, W.post_attention_layernorm.weight: how far 1 % more of an input moves the \
number, in %; not a sum
                   -0.2641  W.post_attention_layernorm.weight[27] = 0.605469, slope -0.290237
                   -0.2634  fwd/L1/resid_mid[0, 5, 27] = 1.25, slope -0.140189
                           and 266 more
  hint           the candidate's number is -0.37575 x ours""",
    ("shared.act", (0, 5, 1)): """
fwd/L1/shared.act[0, 5, 1]: shared experts, activation (R eq 12, FFN^(s))
  equation       silu(gate) up. gate (..., F), up (..., F) -> (..., F).
  inputs         gate = fwd/L1/shared.gate, up = fwd/L1/shared.up
  float64        0.03513603131
  candidate      0.25   difference +2.149e-01
  terms          1, of fwd/L1/shared.up: they sum to the number (apart by 0.0e+00)
                 +3.513603e-02   +100.0%  fwd/L1/shared.up[0, 5, 1] = 0.25  x  0.140544
  first order    of fwd/L1/shared.gate: how far 1 % more of an input moves the number, in %; not a sum
                   +1.1095  fwd/L1/shared.gate[0, 5, 1] = 0.25, slope 0.155928
  hint           the candidate's number is 7.1152 x ours""",
}
"""Recorded, read, and some of it reckoned by hand; what twins give, and so what is allowed, depends on a BLAS and is left out."""


@pytest.mark.parametrize(("tap", "index"), READ)
def test_an_explanation_says_what_was_read(tap, index):
    """Catches a line that is lost or said of another stage, a share or a slope of something else, a mark in another column."""
    lines = explain_number(examined(judged(), "fwd/mask" if tap == "mask" else f"L1/{tap}"), index, most=2)
    left_out = ("  twins", "  allowed        ", "  lean")
    shown = [
        line.replace("w/model.layers.1.", "W.").replace("mlp.shared_experts.", "")
        for line in lines
        if tap == "mask" or not line.startswith(left_out)
    ]
    assert shown == READ[tap, index].split("\n")[1:]


def test_what_is_allowed_is_said_in_the_numbers_own_size():
    """Catches a row's size or its error of another row, "within" where a row is beyond."""
    x = examined(judged(), "L1/resid")
    e = sum(np.asarray(x.grounds.recorded.taps[f"fwd/L1/{n}"], float)[0, 5] for n in ("resid_mid", "ffn_out"))
    y = np.asarray(x.grounds.recorded.taps["fwd/L1/resid"], float)[0, 5]
    size, off, may = (float(v) for v in (np.sqrt(sum(e**2)), np.sqrt(sum((y - e) ** 2)), x.finding.allowed))
    lines = explain_number(x, (0, 5, 3))
    (line,) = [line for line in lines if line.startswith("  allowed")]
    words = f"{may:.1e} of a row's size: here {may:.1e} x {size:.4g} = {may * size:.1e}; the row is off by {off:.1e}, beyond"
    assert line == f"  allowed        {words}"
    lean = f"the whole tap leans one way by {x.finding.lean:.1e}; allowed {x.finding.upright:.1e}"
    assert f"  lean           {lean}" in lines and 0.3 < x.finding.lean < 0.7
    fine = examined(judge(case(), recording("hf-float32")), "L1/resid")
    lines = explain_number(fine, (0, 5, 3))
    assert any("within" in line for line in lines) and not any("lean " in line or "beyond" in line for line in lines)
    (twins,) = [line.split()[1:] for line in lines if line.startswith("  twins")]
    assert [math.isclose(float(t), float(fine.step.exact[0, 5, 3]), rel_tol=1e-5) for t in twins] == [True] * 4


def test_a_choice_of_everything_has_no_rival(tmp_path):
    """Catches a margin of minus infinity, that is the clearest choice called the closest, where nothing else could be chosen."""
    config = PRESETS["tiny"].replace(
        num_hidden_layers=2, n_group=2, topk_group=2, n_routed_experts=4, num_experts_per_tok=4
    )
    whole = Case.read(new_case(tmp_path / "all", config, seed=1, batch=1, length=4))
    j = judge(whole, trace_case(whole))
    for tap in ("L1/router.ids", "L1/router.groups"):
        assert any(
            line.startswith("  margin         inf between") for line in explain_number(examined(j, tap), (0, 1, 0))
        )


def test_tokens_that_chose_others_are_those_whose_sets_differ():
    """Catches sets compared in the order of their slots, or sorted over the tokens. Oracle: Python's sets, token by token."""
    taps = {t: np.array(a) for t, a in recording("hf-float32").taps.items()}
    taps["fwd/L1/router.ids"] = taps["fwd/L1/router.ids"][..., ::-1].copy()
    taken = taps["fwd/L1/router.ids"][1, 13]
    taken[0] = next(e for e in range(16) if e not in taken)
    x = examined(judge(case(), Trace(recording("hf-float32").header, taps)), "L1/router.ids")
    rows = np.ndindex(*x.step.exact.shape[:-1])
    differ = [at for at in rows if set(taps["fwd/L1/router.ids"][at].tolist()) != set(x.step.exact[at].tolist())]
    assert differ == [(1, 13)] == [tuple(at) for at in np.argwhere(x.errors() == 1).tolist()] and x.errors().sum() == 1
    assert x.worst_row() == (1, 13)
