"""The recorder refuses no transformers model, however wrong: it records what there is, says what it did not see, and the
diff judges it.
"""

import pathlib

import numpy as np
import pytest

import refimpl
from refimpl.diff import Case
from refimpl.diff.judge import judge
from refimpl.record import hf, hf_load, hf_taps
from refimpl.record.hf_bugs import with_forward, with_setting
from refimpl.record.torch_arrays import one_thread

TINY = pathlib.Path(refimpl.__file__).parent / "cases" / "tiny"


@pytest.fixture(scope="module", autouse=True)
def _libraries():
    for name in ("torch", "transformers"):
        pytest.importorskip(name, reason="comes with the extra 'interop'; CI runs these tests with it")


@pytest.fixture
def net():
    """The committed case's model, its own for every test."""
    case = Case.read(TINY)
    with one_thread():
        yield hf_load.load_model(case.raw_config, case.weights())


def look(net, **changes):
    c = Case.read(TINY)
    return hf_taps.look(net, c.config.replace(**changes), c.tokens, hf.positions_of(c))


def judged(net):
    """The verdict on a model as it is now, and its trace."""
    case = Case.read(TINY)
    trace = hf.trace_of(net, case)
    return judge(case, trace), trace


def _register_mine():
    """An attention kernel that nobody knows: torch's, under another name."""
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    AttentionInterface.register("mine", sdpa_attention_forward)


def test_a_function_that_is_no_longer_called_is_reported(net):
    """Catches a trace that silently lacks what an attention kernel computed out of sight."""
    _register_mine()
    net.set_attn_implementation("mine")
    seen = look(net)
    assert {"fwd/L0/mla.scores", "fwd/L2/mla.probs"} <= set(seen.expected) - set(seen.taps)
    assert [note for note in seen.notes if "of 93 taps were not seen: " in note]


def test_a_module_that_is_gone_is_reported(net):
    """Catches a trace that silently lacks the taps of a module that another version renamed."""
    seen = look(net, q_lora_rank=None)
    assert "transformers has no module model.layers.0.self_attn.q_proj" in seen.notes
    assert "fwd/L0/mla.q" in set(seen.expected) - set(seen.taps)


def test_a_tap_of_another_shape_is_kept_as_it_is_and_reported(net):
    """Catches heads and channels reshaped into each other because only their number was right, and a guess at what a
    function computes that is kept although its shape contradicts it.
    """
    seen = look(net, num_attention_heads=3)
    assert "fwd/L0/mla.q has shape (2, 24, 80); expected B S H Dn+Dr" in seen.notes
    assert seen.taps["fwd/L0/mla.q"].shape == (2, 24, 80) and "fwd/L0/mla.scores" not in seen.taps


def test_what_is_missing_makes_the_verdict_inconclusive(net):
    """Catches a header that expects only what there was: half a trace would pass as a whole one."""
    _register_mine()
    net.set_attn_implementation("mine")
    found, trace = judged(net)
    assert found.verdict == "INCONCLUSIVE" and not found.culprits
    assert "of 93 taps were not seen: " in trace.header.notes and trace.header.notes.startswith("mine")


def _softmax_router(gate, forward):
    """Softmax where the sigmoid belongs, and nothing else changed."""

    def route(x):
        import torch

        logits = torch.nn.functional.linear(x.view(-1, gate.hidden_dim), gate.weight)
        choice = logits.softmax(-1) + gate.e_score_correction_bias
        groups = choice.view(len(choice), gate.num_group, -1)
        kept = torch.topk(groups.topk(2)[0].sum(-1), gate.topk_group, sorted=False)[1]
        inside = torch.zeros(groups.shape[:2]).scatter(1, kept, 1).bool()
        masked = groups.masked_fill(~inside[..., None], -torch.inf).flatten(1)
        ids = torch.topk(masked, gate.top_k)[1]
        g = logits.softmax(-1).gather(1, ids)
        return logits, g / g.sum(-1, keepdim=True) * gate.routed_scaling_factor, ids

    return route


def test_softmax_instead_of_sigmoid_is_recorded_and_judged(net):
    """Catches a recorder that refuses a wrong model instead of recording it: the function that gives the scores is not
    called, and what is computed from them shows it.
    """
    with with_forward(net, "mlp.gate", _softmax_router):
        found, trace = judged(net)
    assert set(trace.header.expected) - set(trace.taps) == {"fwd/L1/router.scores", "fwd/L2/router.scores"}
    assert {f.stage for f in found.culprits} == {"router.choice", "router.weights"}


def test_an_expert_too_many_is_recorded_and_judged(net):
    """Catches a recorder that refuses, or cuts to size, what has another shape than it should."""
    with with_setting(net, "mlp.gate", "top_k", lambda gate: gate.top_k + 1):
        found, trace = judged(net)
    assert trace.taps["fwd/L1/router.ids"].shape == (2, 24, 5)
    assert "router.ids" in {f.stage for f in found.culprits}


def test_dropped_tokens_are_recorded_and_judged(net):
    """Catches rows of experts that are put in the places of others because some are missing."""

    def capacity(experts, forward):
        return lambda x, ids, weights: forward(x, ids.masked_fill(ids == ids[0, 0], experts.num_experts), weights)

    with with_forward(net, "mlp.experts", capacity):
        found, trace = judged(net)
    assert "fwd/L1/moe.down" in set(trace.header.expected) - set(trace.taps)
    assert {f.stage for f in found.culprits} == {"moe.routed"}
    assert "the rows that the experts multiply are not those of the experts that were chosen" in trace.header.notes


def test_experts_are_told_by_their_weights_not_by_their_turn(net):
    """Catches rows taken for those of another expert where a correct loop runs the other way."""
    import torch

    def falling(experts, forward):
        def run(x, ids, weights):
            out = torch.zeros_like(x)
            for e in sorted(ids.unique().tolist(), reverse=True):
                slot, token = (e == ids.T).nonzero(as_tuple=True)
                gate, up = torch.nn.functional.linear(x[token], experts.gate_up_proj[e]).chunk(2, -1)
                down = torch.nn.functional.linear(experts.act_fn(gate) * up, experts.down_proj[e])
                out.index_add_(0, token, down * weights[token, slot, None])
            return out

        return run

    plain = look(net).taps
    with with_forward(net, "mlp.experts", falling):
        found, trace = judged(net)
    assert found.verdict == "CONFORMS"
    np.testing.assert_array_equal(trace.taps["fwd/L1/moe.down"], plain["fwd/L1/moe.down"])


def test_a_kernel_of_another_make_is_not_mistaken(net):
    """Catches the first product taken for that of whole queries, and exponentials taken for probabilities."""
    import torch

    def parts(a, q, k, v, mask, scaling, **_):
        n = a.qk_nope_head_dim
        scores = torch.matmul(q[..., :n], k[..., :n].mT) + torch.matmul(q[..., n:], k[..., n:].mT)
        p = (scores * scaling + mask).exp()
        return (torch.matmul(p, v) / p.sum(-1, keepdim=True)).transpose(1, 2), None

    theirs = "transformers.models.deepseek_v3.modeling_deepseek_v3.eager_attention_forward"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(theirs, parts)
        found, trace = judged(net)
    unseen = {t.rpartition("/")[2] for t in set(trace.header.expected) - set(trace.taps)}
    assert unseen == {"mla.q_rope", "mla.k_rope", "mla.scores", "mla.probs"} and not found.culprits


def test_a_tap_that_comes_twice_is_kept_once(net):
    """Catches a second call that overwrites the first, and one that stops the recording."""

    def twice(mlp, forward):
        def run(x):
            mlp.shared_experts(x * 2)
            return forward(x)

        return run

    plain = look(net).taps["fwd/L1/moe.shared"]
    with with_forward(net, "layers.1.mlp", twice):
        seen = look(net)
    assert "fwd/L1/moe.shared was seen twice in one run: the first is kept" in seen.notes
    assert np.abs(seen.taps["fwd/L1/moe.shared"] - plain).max() > 0.1
