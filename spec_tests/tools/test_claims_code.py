"""What code printed in articles about V3 would really compute (docs/claims.md names each test), and sums that the rows quote.

Each translation into NumPy follows the article's code; the other side is the specification.
"""

import re
import runpy

import numpy as np
import pytest

from refimpl.autograd import Parameter, backward, nn_ops, ops, recompute
from refimpl.checkpoint.atomic import Transaction
from refimpl.checkpoint.info import count_parameters
from refimpl.layers import PRESETS
from refimpl.layers.common import mask
from refimpl.layers.router import ids, seq_aux, weights
from refimpl.model import expected_tensors
from refimpl.parallel_emulation.cost.layer_cost import expert_parameters, kv_cache_bytes
from refimpl.parallel_emulation.cost.published import TRAINING as RUN
from refimpl.parallel_emulation.cost.scale import published_rate
from refimpl.parallel_emulation.pipeline.schedules import build
from refimpl.parallel_emulation.pipeline.timeline import Times, simulate

from .tree import ROOT, in_repository

V3 = PRESETS["deepseek-v3"]


@pytest.fixture
def rng():
    return np.random.default_rng(13)


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def best(x, k):
    return np.sort(np.argsort(-x, axis=-1, kind="stable")[..., :k], axis=-1)


# ---- Gates


def ones_for_the_best(logits, k=2):
    """The router of article 1: ones at the top k, over their number."""
    m = np.zeros_like(logits)
    np.put_along_axis(m, best(logits, k), 1, axis=-1)
    return m / m.sum(-1, keepdims=True)


def test_ones_in_place_of_scores_weigh_all_experts_alike(rng):
    """Catches the claim that a mask of ones is V3's gate: it is flat where V3's weights follow the scores, with a gradient."""
    z = rng.normal(size=(1, 6, 8)) - 3  # small affinities, whose ratios are large
    flat = ones_for_the_best(z)
    assert set(np.unique(flat)) == {0.0, 0.5}
    np.testing.assert_array_equal(ones_for_the_best(z * (1 + 1e-6)), flat)  # no slope anywhere: no gradient
    chosen = best(z, 2)
    s = Parameter(1 / (1 + np.exp(-z)))
    g = weights(s, chosen, normalise=True, eps=0.0, scale=1.0)
    assert np.abs(g.data - 0.5).max() > 0.05
    assert np.abs(backward(ops.sum(g * rng.normal(size=g.shape)))[s]).max() > 1e-3


def test_a_temperature_changes_no_choice(rng):
    """Catches the claim that a softmax over a temperature balances: top-2 of it is top-2 of the logits, whatever the load was."""
    z = rng.normal(size=(64, 8)) + np.array([3, 2, 0, 0, 0, 0, 0, 0])  # two favourites
    for temperature in (0.1, 1.0, 10.0):
        np.testing.assert_array_equal(best(softmax(z / temperature), 2), best(z, 2))
    bias = np.zeros(8)
    for _ in range(4000):  # V3's way, on the same tokens
        load = np.bincount(ids(z + bias, None, k=2, n_group=1, fill=-np.inf).reshape(-1), minlength=8)
        bias += 0.001 * np.sign(load.mean() - load)
    unbalanced = np.bincount(best(z, 2).reshape(-1), minlength=8)
    assert unbalanced.max() > 40 and load.max() <= 20  # the mean is 16


def test_a_mean_of_experts_forgets_the_gate(rng):
    """Catches the claim that a mean of the chosen experts is routing: any gate with the same two favourites gives the same."""
    y = rng.normal(size=(8, 5))  # what 8 experts make of one token
    z = np.array([4.0, 3.9, 0, 0, 0, 0, 0, 0])

    def mean_of_best(z):
        return y[best(z, 2)].sum(0) / 2

    sharper = z + 5.0 * np.eye(8)[0]
    np.testing.assert_array_equal(mean_of_best(sharper), mean_of_best(z))
    s = 1 / (1 + np.exp(-np.stack([z, sharper - 6])))[None]
    g = weights(s, best(s, 2), normalise=True, eps=0.0, scale=1.0)
    assert np.abs(g[0, 0] - g[0, 1]).max() > 0.1


def test_a_sum_over_all_experts_routes_nothing(rng):
    """Catches the claim that the two-stage code routes: every expert is called for every token."""
    calls = []

    def expert(i):
        return lambda x, weight: calls.append(i) or weight * np.tanh(x * (i + 1))

    x, gates = rng.normal(size=3), rng.normal(size=16)
    coarse = softmax(gates)
    y = sum(expert(i)(x, coarse[i]) for i in range(16))
    assert calls == list(range(16))
    chosen = best(coarse, 4)
    np.testing.assert_array_less(1e-3, np.abs(y - sum(coarse[i] * np.tanh(x * (i + 1)) for i in chosen)))


def test_load_over_mean_load_is_f_of_the_balance_loss(rng):
    """Catches a balance loss whose f_i is not load over mean load: that ratio is in V3, there, and nowhere in the bias."""
    s = rng.uniform(0.1, 1, size=(1, 40, 8))
    routed = best(s, 3)
    load = np.bincount(routed.reshape(-1), minlength=8)
    p = (s / s.sum(-1, keepdims=True)).mean((0, 1))
    expected = 0.01 * np.sum(load / load.mean() * p)
    assert seq_aux(s, routed, k=3, alpha=0.01) == pytest.approx(expected, rel=1e-12)  # float64: rounding of 8 terms


# ---- Attention


@pytest.mark.parametrize("distance", ["query - key", "key - query", "absolute"])
def test_the_mask_as_printed_is_never_a_causal_one(distance, rng):
    """Catches the claim that 0 beyond a distance of 5 and 1 within is a mask for a language model, however it is read."""
    i, j = np.indices((12, 12))
    d = {"query - key": i - j, "key - query": j - i, "absolute": abs(i - j)}[distance]
    printed = np.where(d > 5, 0, 1)
    keep, hide = printed == 1, printed == 0  # 1 means "attend", or (as torch's attention layer reads it) "do not"
    ours = mask(np.arange(12)[None], None, None, None, past=0, dtype=np.float64)[0, 0] == 0
    np.testing.assert_array_equal(ours, j <= i)
    assert not (keep == ours).all() and not (hide == ours).all()
    assert (keep & (j > i)).any()  # the future is seen
    assert not hide[abs(i - j) <= 5].any()  # only far tokens are kept; the nearest six, itself among them, are not
    assert (softmax(rng.normal(size=(12, 12)) + printed) > 0).all()  # added to the scores: nothing is hidden


def test_a_softmax_over_one_text_is_one(rng):
    """Catches the claim that its only entry compares an image with a text."""
    for _ in range(5):
        image, text = rng.normal(size=(1, 16)), rng.normal(size=(1, 16))
        assert softmax(100 * image @ text.T)[0, 0] == 1.0


# ---- Training


def test_losses_kept_by_task_name_lose_samples():
    """Catches the claim that the dictionary of losses is their weighted mean."""

    def printed(losses, tasks, weights):
        kept = {}
        for loss, task, weight in zip(losses, tasks, weights, strict=True):
            if task in ("code_gen", "math_reasoning"):
                kept[task] = loss * weight
        return sum(kept.values()) / len(tasks)

    assert printed([8.0, 2.0], ["code_gen", "code_gen"], [1, 1]) == 1.0  # their mean is 5
    assert printed([8.0, 2.0], ["dialogue", "code_gen"], [1, 1]) == 1.0  # the dialogue only divides


def test_a_square_error_of_token_numbers_depends_on_their_order(rng):
    """Catches the claim that a mean square trains a language model: it changes when the vocabulary is renumbered."""
    logits, labels, renumber = rng.normal(size=(6, 9)), rng.integers(9, size=6), rng.permutation(9)
    answers = logits.argmax(-1)
    assert np.mean((answers - labels) ** 2) != np.mean((renumber[answers] - renumber[labels]) ** 2)
    shuffled = np.empty_like(logits)
    shuffled[:, renumber] = logits
    a, b = nn_ops.nll.raw(logits, labels)[0], nn_ops.nll.raw(shuffled, renumber[labels])[0]
    np.testing.assert_allclose(a, b, rtol=1e-12)  # float64: the sum in the softmax runs in another order


def test_requires_grad_by_size_freezes_what_recomputation_trains(rng):
    """Catches the claim that freezing is checkpointing: small weights get no gradient; recomputation changes none."""
    x = rng.normal(size=(3, 4))
    w = {"small": rng.normal(size=(8, 4)), "large": rng.normal(size=(64, 8))}

    def loss(small, large):
        return ops.sum(nn_ops.sigmoid(nn_ops.linear(nn_ops.sigmoid(nn_ops.linear(x, small)), large)))

    budget = 1024  # bytes of FP32, as printed: 128 and 2048
    printed = {n: Parameter(a) if a.size * 4 > budget else a for n, a in w.items()}
    plain, again = ({n: Parameter(a) for n, a in w.items()} for _ in range(2))
    frozen = backward(loss(**printed))
    assert [n for n, a in printed.items() if isinstance(a, Parameter) and a in frozen] == ["large"]
    expected, found = backward(loss(**plain)), backward(recompute(loss)(*again.values()))
    for name in w:
        np.testing.assert_array_equal(found[again[name]], expected[plain[name]])


def test_a_checkpoint_written_in_place_is_lost_when_the_write_is_interrupted(tmp_path):
    """Catches the claim that a plain save is recoverable: a full disk half-way leaves half a file, and no old one."""

    def write(f):
        f.write(b"new, first half")
        raise OSError("no space left")

    plain, whole = tmp_path / "plain.pt", tmp_path / "whole.pt"
    for path in (plain, whole):
        path.write_bytes(b"old")
    with pytest.raises(OSError), plain.open("wb") as f:
        write(f)
    with pytest.raises(Exception, match="no space left"), Transaction() as files, files.new(whole) as f:
        write(f)
    assert plain.read_bytes() == b"new, first half" and whole.read_bytes() == b"old"


@pytest.mark.parametrize(("stages", "m"), [(4, 1), (4, 8), (8, 20)])
def test_chunks_one_after_another_are_no_pipeline(stages, m):
    """Catches the claim that the loop over chunks is a pipeline's forward pass: m P steps against m + P - 1."""
    steps = 0
    for _ in range(m):  # the printed function, once a micro-batch
        outputs = []
        for _ in range(stages):
            outputs.append(0)
            steps += 1
        assert len(outputs) == stages  # all are kept
    pipeline = simulate(build("gpipe", stages, m), Times(F=1, B=0, W=0)).makespan
    assert (steps, pipeline) == (m * stages, m + stages - 1)


def test_quicksort_with_the_last_pivot_goes_n_deep():
    """Catches the claim of O(log n) stack: on sorted input each call leaves one element out."""

    def depth(a, low, high):
        if low >= high:
            return 0
        pivot, i = a[high], low - 1
        for j in range(low, high):
            if a[j] <= pivot:
                i += 1
                a[i], a[j] = a[j], a[i]
        a[i + 1], a[high] = a[high], a[i + 1]
        return 1 + max(depth(a, low, i), depth(a, i + 2, high))

    assert depth(list(range(200)), 0, 199) == 199
    assert depth(list(np.random.default_rng(0).permutation(200)), 0, 199) < 40


# ---- Sums


def test_utilisation_follows_from_the_published_hours():
    """Catches a utilisation in a row that the published FLOP, tokens, hours and peak do not give."""
    flop = RUN.flops_per_token * RUN.trillions * 1e12
    share = flop / (RUN.pretraining_hours * 3600 * RUN.peak_tflops * 1e12)
    assert round(100 * share) == 39 == round(100 * published_rate().utilisation)


def test_v3_has_no_weights_for_images():
    """Catches a tensor of the checkpoint that is no embedding of tokens, attention, feed-forward, norm, head or MTP."""
    parts = r"self_attn\.\w+|mlp\.(experts\.\d+\.|shared_experts\.)?(gate|up|down)_proj|mlp\.gate|\w+_layernorm"
    mtp = r"enorm|hnorm|eh_proj|shared_head\.(norm|head)|embed_tokens"
    layer = rf"model\.layers\.\d+\.({parts}|{mtp})\.(weight|e_score_correction_bias)"
    known = rf"{layer}|model\.(embed_tokens|norm)\.weight|lm_head\.weight"
    names = expected_tensors(V3)
    assert not [n for n in names if not re.fullmatch(known, n)]
    assert [n for n in names if n.startswith("model.embed")] == ["model.embed_tokens.weight"]


def quoted():
    """id -> the numbers of its row, computed."""
    n, cache = count_parameters(V3), V3.kv_lora_rank + V3.qk_rope_head_dim
    heads = V3.num_attention_heads * (V3.qk_nope_head_dim + V3.qk_rope_head_dim + V3.v_head_dim)
    fp8, bf16 = f"{n.total / 1e9:.0f} GB", f"{2 * n.total / 1e9:,.0f} GB"
    kept = n.total + n.mtp + n.embedding + n.head  # MTP has copies of embedding and head
    two_bytes = 2 * (n.embedding + n.head) + n.router + 2 * V3.hidden_size**2  # BF16: these, the router, eh_proj
    file = kept + two_bytes + 4 * kept / 128**2  # and a scale of 4 bytes for each 128 x 128 block
    rule = 5e-4 * RUN.sequences_per_step / 256
    return {
        "a1-07": [f"{n.active / 1e9:.1f}", f"{n.total / 1e9:.1f} billion"],
        "a1-48": [f"{0.02 * n.total / 1e9:.1f} billion"],
        "a2-04": [f"{expert_parameters(V3):,}", f"{3 * V3.hidden_size * V3.moe_intermediate_size:,}"],
        "a2-05": [f"{n.total / n.active:.1f}"],
        "a2-17": [f"{2 * 175} GB", "175 GB in FP8"],
        "a2-20": [str(cache), f"{kv_cache_bytes(V3):,}"],
        "a2-36": [f"{2 * 34} GB"],
        "a3-03": [f"{n.total / n.active:.1f}"],
        "a3-10": [fp8, bf16],
        "a3-11": [f"{file / 1e9:.0f} GB", f"{2 * n.total / 1e12:.2f} TB"],
        "a3-15": [fp8, bf16],
        "a4-27": [f"{2 * count_parameters(PRESETS['deepseek-v2']).total / 1e9:.0f} GB"],
        "a4-30": [f"{rule:.2f} at {RUN.sequences_per_step:,}", f"{rule / 2.2e-4:.0f} times"],
        "a5-03": [str(cache), f"{heads:,}"],
    }


@pytest.mark.slow
@in_repository
def test_sizes_that_rows_quote():
    """Catches a size in a row that the config does not give."""
    found = runpy.run_path(str(ROOT / ".ci" / "claims.py"))["articles"]()
    rows = {c["id"]: c for a in found for c in a["claim"]}
    for claim, numbers in quoted().items():
        assert all(re.search(rf"(?<![\d.]){re.escape(x)}", rows[claim]["why"]) for x in numbers), (claim, numbers)
    n = count_parameters(V3)
    assert n.total > 8 * 80e9 and n.total < 8 * 128e9  # a2-04, a3-10, a3-15
