"""R 3.4: prefill and decode on ranks of their own give one rank's answers, bit for bit where the order of sums is fixed."""

import itertools
from functools import partial

import ml_dtypes
import numpy as np
import pytest

from refimpl.autograd.errors import SpecError
from refimpl.infer.engine import Tiled
from refimpl.infer.split import Deployment, alone, kv, order, serve
from refimpl.layers.numerics.quantisation import pack_latent, unpack_latent
from refimpl.layers.presets import DEEPSEEK_V3
from refimpl.layers.stage import observing
from refimpl.parallel_emulation.axes.expert_wire import V1
from refimpl.parallel_emulation.collectives import shares, slices
from refimpl.parallel_emulation.comm import Log, spmd
from refimpl.parallel_emulation.serving import decode_overlap, kv_transfer_bytes, prefill_overlap
from refimpl.spec_tests.cases.serving_programs import CONFIG, TOKENS, model, one_rank, prompts
from refimpl.spec_tests.cases.small_models import CLOSE

MODEL = model()


def served(how, *, observers=(), log=None, given=None, seed=None, **more):
    """(answers, logits (n, V)) of all prompts, and everybody's moves."""
    given = prompts() if given is None else given
    with observing(*observers):
        got = spmd(how.ranks, partial(run, given, how, more), log=log, seed=seed)
    answers, first, rest = {}, {}, {}
    for rank in got:
        answers |= rank.answers
        first |= rank.prompt_logits
        rest |= rank.step_logits
    found = [(answers[r], np.array([first[r], *rest[r]])) for r in range(len(given))]
    return found, [rank.moves for rank in got[how.prefill :]]


def run(given, how, more, comm):
    return serve(comm, MODEL, given, TOKENS, how, **({"per_round": 2} | more))


def assert_same(found, wanted):
    for (answer, logits), (want, want_logits) in zip(found, wanted, strict=True):
        assert answer == want
        np.testing.assert_array_equal(logits, want_logits)


def assert_close(found, wanted):
    for (answer, logits), (want, want_logits) in zip(found, wanted, strict=True):
        assert answer == want
        np.testing.assert_allclose(logits, want_logits, **CLOSE)


WHOLE = {
    "one and one": Deployment(tp=1, decode=1),
    "one expert a rank, four of them twice": Deployment(tp=1, dp=2, decode=16, decode_slots=16),
    "replicas in both units, new plans": Deployment(tp=1, dp=3, decode=4, prefill_slots=15, decode_slots=20, replan=1),
    "fewer run than are held": Deployment(
        tp=1, dp=2, decode=4, prefill_slots=24, decode_slots=24, prefill_active=7, decode_active=4, replan=2
    ),
}


@pytest.mark.parametrize("name", WHOLE)
def test_without_tensor_parallelism_the_bits_are_one_ranks(name):
    """Greedy tokens and logits of every step, in the batch-invariant mode. Catches a token computed by another expert, with
    another weight, on another's latents, or added up in the order of slots; and a rank without requests that stays away.
    """
    around = (Tiled(),)
    found, _ = served(WHOLE[name], observers=around)
    assert_same(found, one_rank(MODEL, prompts(), TOKENS, observers=around))


TP = {
    "tp 4": Deployment(tp=4, decode=2),
    "tp 2 x dp 2": Deployment(tp=2, dp=2, decode=3, prefill_slots=16, prefill_active=3, decode_slots=15),
}


def columns_alike(m):
    """Whether this BLAS gives a product's columns the same bits however many stand beside them: heads that are split."""
    rng, rows = np.random.default_rng(0), Tiled().rows
    for w in (m.q_b_proj.weight, m.kv_b_proj.weight):
        x, h = rng.standard_normal((rows, w.shape[1])), len(w) // CONFIG.num_attention_heads
        parts = [
            x @ w[h * s.start : h * s.stop].T for n in (2, 4) for s in slices(shares(CONFIG.num_attention_heads, n))
        ]
        if any((np.concatenate(p, axis=1) != x @ w.T).any() for p in (parts[:2], parts[2:])):
            return False
    return True


@pytest.mark.parametrize("name", TP)
def test_with_tensor_parallelism_the_bits_are_those_of_its_order(name):
    """One rank that adds its heads up as the ranks do. Catches heads, or shares of a prompt, at the wrong rank; a sum in another
    order than ranks'. Not where a BLAS looks at a product's width, as some do for a single row.
    """
    if not columns_alike(MODEL.model.layers[0].self_attn):
        pytest.skip("this BLAS looks at a product's width")
    around = (Tiled(),)
    found, _ = served(TP[name], observers=around)
    assert_same(found, one_rank(MODEL, prompts(), TOKENS, observers=around, parts=TP[name].tp))


@pytest.mark.parametrize("how", [*TP.values(), Deployment(tp=2, decode=4, decode_slots=16, recipe=V1, replan=2)])
def test_in_any_order_the_tokens_are_one_ranks(how):
    """Without the invariant mode, also with DeepEP V1's partial sums: the same tokens, logits within two orders of float64 sums.
    Catches what only the bits would show to be wrong by more than rounding.
    """
    assert_close(served(how)[0], one_rank(MODEL, prompts(), TOKENS))


def bf16(a):
    return a.astype(ml_dtypes.bfloat16).astype(a.dtype)


def fp8(c, k):
    back = unpack_latent(pack_latent(c, k), latent=CONFIG.kv_lora_rank, rope=CONFIG.qk_rope_head_dim)
    return tuple(a.astype(c.dtype) for a in back)


@pytest.mark.parametrize(
    ("fmt", "through"), [("bf16", lambda c, k: (bf16(c), bf16(k))), ("fp8", fp8)], ids=["bf16", "fp8"]
)
def test_a_rounded_transfer_rounds_the_prompts_latents_and_nothing_else(fmt, through):
    """Bits of one rank whose cache was rounded once, behind the prompt. Catches latents rounded in every step, or keys not at
    all, and tokens of the tensor-parallel ranks in another order.
    """
    around = (Tiled(),)
    how = Deployment(tp=1, dp=2, decode=2, kv=fmt)
    found, _ = served(how, observers=around)
    assert_same(found, one_rank(MODEL, prompts(), TOKENS, observers=around, through=through))


@pytest.mark.slow
def test_a_deployment_like_the_reports_gives_one_ranks_answers():
    """R 3.4.1 in small: TP4 x DP8, experts with replicas over all 32 ranks; 20 decode ranks with one expert each. Greedy
    tokens, and the bits of TP4's order. Catches groups that mix up their prompts, which fewer do not show.
    """
    how = Deployment(tp=4, dp=8, decode=20, prefill_slots=64, decode_slots=20, replan=2)
    given = prompts(range(3, 19))
    assert_close(served(how, given=given, per_round=8)[0], one_rank(MODEL, given, TOKENS))
    if columns_alike(MODEL.model.layers[0].self_attn):
        around = (Tiled(),)
        found, _ = served(how, given=given, observers=around, per_round=8)
        assert_same(found, one_rank(MODEL, given, TOKENS, observers=around, parts=4))


# ---- The transfer on the wire


@pytest.mark.parametrize(("fmt", "bytes_a_token"), [("bf16", 70_272), ("fp8", 40_016)])
def test_v3_hands_over_70272_bytes_a_token(fmt, bytes_a_token):
    """61 layers of 576 numbers in BF16; in FP8 656 bytes: 512 codes, 4 scales, 64 numbers in BF16. The log of what was sent by 4
    tensor-parallel ranks, for a prompt that they share unevenly. Catches latents sent by every rank, or per head.
    """
    c, tokens, tp = DEEPSEEK_V3, 6, 4
    rng = np.random.default_rng(0)
    whole = [
        (rng.standard_normal((tokens, 512), np.float32), rng.standard_normal((tokens, 64), np.float32))
        for _ in range(61)
    ]

    def program(comm):
        if comm.rank == tp:
            parts = comm.exchange([], kv.recvs(c, range(tp)), "kv")
            return kv.joined(parts, c, tokens, tp, fmt, np.float32)
        cut = slices(shares(tokens, tp))[comm.rank]
        return comm.exchange(kv.sends([(a[cut], b[cut]) for a, b in whole], tp, fmt), [], "kv")

    log = Log()
    cache = spmd(tp + 1, program, log=log)[tp]
    assert log.bytes() == bytes_a_token * tokens
    assert [log.bytes(rank=r) for r in range(tp)] == [bytes_a_token * n for n in shares(tokens, tp)]
    assert fmt != "bf16" or bytes_a_token == kv_transfer_bytes(c, 1)
    for (c_kv, key), (a, b) in zip(cache, whole, strict=True):
        np.testing.assert_array_equal(key[0], bf16(b))  # in both formats
        np.testing.assert_allclose(
            c_kv[0], a, rtol=2**-8 if fmt == "bf16" else 2**-3, atol=0 if fmt == "bf16" else 2**-7
        )


def test_a_run_sends_the_prompts_once_and_nothing_else_between_the_units():
    """Bytes between the two units: C + Dr float64 numbers a token and layer, and one token a request. Catches a transfer of what
    was decoded, and collectives over the whole run.
    """
    log, how = Log(), Deployment(tp=2, dp=2, decode=3)
    served(how, log=log)
    numbers = sum(map(len, prompts())) * CONFIG.num_hidden_layers * (CONFIG.kv_lora_rank + CONFIG.qk_rope_head_dim)
    assert log.bytes(label="kv") == numbers * 8
    assert all(log.bytes(rank=rank, label="kv") for rank in range(how.prefill)), "a group without work"
    between = log.matrix(how.ranks)
    assert between[:4, 4:].sum() == numbers * 8 + len(prompts()) * 8
    assert between[4:, :4].sum() == 0


def test_everybody_who_decodes_gets_a_token_in_every_step():
    """Five answers on one rank take as many steps as one. Catches a sequence that is in neither micro-batch and waits."""
    log, how = Log(), Deployment(tp=1, decode=1)
    served(how, log=log, per_round=0)
    assert log.calls(rank=how.prefill, label="left") == TOKENS - 1


# ---- Two micro-batches


@pytest.mark.parametrize("make", [prefill_overlap, decode_overlap])
def test_the_order_of_a_run_is_that_of_both_lanes(make):
    """Each part once, behind what its micro-batch does before; both lanes in their own order; and while one micro-batch is on the
    network, the other computes. Catches an order that is one micro-batch after the other.
    """
    lanes = make(4)
    parts = order(lanes)
    assert sorted(parts) == sorted([*lanes.compute, *lanes.network])
    assert [p for p in parts if p in lanes.network] == list(lanes.network)
    assert [p for p in parts if p in lanes.compute] == list(lanes.compute)
    for i, part in enumerate(parts):
        before = lanes.before(part)
        assert before is None or before in parts[:i]
    turns = sum(a.batch != b.batch for a, b in itertools.pairwise(parts))
    assert turns >= 2 * 4  # at least twice a layer
    serial = alone(lanes)
    assert [p.batch for p in serial] == sorted(p.batch for p in parts)
    assert all(lanes.before(p) in (None, q) for q, p in itertools.pairwise(serial) if q.batch == p.batch)


def network(log, rank):
    """(stage, layer, batch) of the transfers of a rank in the order they were made."""
    labels = [r.label.split(".") for r in log.select(rank=rank, op="alltoallv") if r.label.endswith((".rail", ".node"))]
    found = [(stage, int(at[1:]), int(batch)) for stage, at, batch, _ in labels if stage in ("dispatch", "combine")]
    return [step for i, step in enumerate(found) if i == 0 or step != found[i - 1]]


def test_two_micro_batches_take_turns_on_the_network_and_change_nothing():
    """The log of a prefill and of a decode rank against their lanes, and the same bits without. Catches an overlap that is only
    drawn, and micro-batches that share a buffer.
    """
    log, how = Log(), Deployment(tp=1, dp=2, decode=2)
    around = (Tiled(),)
    found, _ = served(how, observers=around, log=log, per_round=0)
    for rank, lanes in ((0, prefill_overlap(2)), (2, decode_overlap(2))):
        one = [(p.stage, p.layer, p.batch) for p in lanes.network if CONFIG.is_moe(p.layer)]
        seen = network(log, rank)
        assert seen[: len(one)] == one and len(seen) % len(one) == 0
    still, _ = served(Deployment(tp=1, dp=2, decode=2, overlap=False), observers=around, seed=5)
    assert_same(still, found)


# ---- Ends and errors


def test_answers_end_with_eos_and_ranks_go_on_for_the_others():
    """Catches a token behind the end, and a rank that leaves while others still need its experts."""
    whole = one_rank(MODEL, prompts(), TOKENS)
    for eos in (whole[0][0][0], whole[0][0][1]):  # the first comes from the prefill unit
        wanted = [a[: a.index(eos) + 1] if eos in a else a for a, _ in whole]
        assert {len(a) for a in wanted} > {TOKENS}
        found, _ = served(Deployment(tp=1, decode=4), eos=[eos])
        assert [a for a, _ in found] == wanted


@pytest.mark.parametrize(
    ("how", "more", "complaint"),
    [
        ({"tp": 1, "decode": 1}, {"given": [[]]}, "not empty|in prompt 0"),
        ({"tp": 1, "decode": 1}, {"given": [[1], [99]]}, "in prompt 1"),
        ({"tp": 1, "decode": 1}, {"given": [np.zeros(510, int)]}, "do not fit the window of 512"),
        ({"tp": 1, "decode": 5, "decode_slots": 12}, {}, "12 expert slots do not divide among 5 ranks"),
        ({"tp": 1, "decode": 4, "decode_slots": 8}, {}, "8 slots are too few for 12 experts"),
        ({"tp": 6, "decode": 1}, {}, "5 heads for 6"),
        ({"tp": 1, "decode": 4, "decode_active": 4}, {}, "4 active of 3 experts a rank"),
        ({"tp": 1, "decode": 4, "decode_active": 1, "decode_slots": 12}, {"per_round": 0}, "they do not fit 1 a rank"),
        ({"tp": 1, "decode": 1}, {"per_round": -1}, "-1 prompts a round"),
    ],
)
def test_what_cannot_be_served_is_refused(how, more, complaint):
    """Catches ranks that hang because one has given up, experts left out in silence, and a traceback."""
    with pytest.raises(SpecError, match=complaint):
        served(Deployment(**how), **more)


def test_ranks_with_different_models_do_not_hand_latents_over():
    """Catches a decode unit that reads another checkpoint's latents: shapes and configs agree, weights do not."""
    other = MODEL.map(lambda name, w: w * 2 if name == "model.norm.weight" else w)

    def rank(comm):
        return serve(comm, (MODEL, other)[comm.rank], prompts(), TOKENS, Deployment(tp=1, decode=1))

    with pytest.raises(SpecError, match="unit of model"):
        spmd(2, rank)


def test_deployments_that_cannot_be_are_refused():
    """Catches a run with other ranks than were planned, a format nobody knows, and a prompt of which tokens are missing."""
    rows = [np.zeros((n, 17)) for n in (2, 2, 2, 2)]
    with pytest.raises(SpecError, match=r"\[2, 2\] tokens of a prompt of 5 came from 2 ranks"):
        kv.joined(rows, CONFIG, 5, 2, "own", np.float64)
    with pytest.raises(SpecError, match="tp 0"):
        Deployment(tp=0)
    with pytest.raises(SpecError, match="'own', 'bf16' or 'fp8'"):
        Deployment(kv="fp4")
    with pytest.raises(SpecError, match="takes 2 ranks, the run has 3"):
        spmd(3, partial(run, prompts(), Deployment(tp=1, decode=1), {}))
