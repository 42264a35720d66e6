"""What experts are chosen by is recorded as such, whatever the gate scores its groups by and however it drops them."""

import pathlib

import numpy as np
import pytest

import refimpl
from refimpl.diff import Case, render
from refimpl.diff.judge import judge
from refimpl.layers import PRESETS
from refimpl.record import hf, hf_load, new_case
from refimpl.record.hf_bugs import injected, with_forward
from refimpl.record.hf_choice import Choosing
from refimpl.record.hf_probes import Seen
from refimpl.record.torch_arrays import one_thread

TINY = pathlib.Path(refimpl.__file__).parent / "cases" / "tiny"


@pytest.fixture(scope="module", autouse=True)
def _libraries():
    for name in ("torch", "transformers"):
        pytest.importorskip(name, reason="comes with the extra 'interop'; CI runs these tests with it")


@pytest.fixture(scope="module")
def case():
    return Case.read(TINY)


@pytest.fixture(scope="module")
def net(case):
    with one_thread():
        return hf_load.load_model(case.raw_config, case.weights())


def in_order(x, groups):
    """(N, E) -> (N, G, E/G): the first E/G experts are the first group."""
    return x.view(len(x), groups, -1)


def round_robin(x, groups):
    """(N, E) -> (N, G, E/G): expert e is in group e mod G."""
    return x.view(len(x), -1, groups).transpose(1, 2)


def back(x, grouped):
    """(N, G, E/G) -> (N, E), what `grouped` did undone."""
    return (x.transpose(1, 2) if grouped is round_robin else x).reshape(len(x), -1)


# ---- Ways to drop groups: what is left to choose from, given the experts that are kept (N, E)


def fill(choice, kept):
    return choice.masked_fill(~kept, -np.inf)


def fill_in_place(choice, kept):
    return choice.masked_fill_(~kept, -np.inf)


def assign(choice, kept):
    choice[~kept] = -np.inf
    return choice


def where(choice, kept):
    import torch

    return torch.where(kept, choice, -1e9)


def add(choice, kept):
    return choice + (1 - kept.float()) * -1e9


def twice(choice, kept):
    """Zero, and then out of the way: both hold the choice where it is kept."""
    return fill(choice * kept, kept)


def nothing(choice, kept):
    return choice


# ---- The gate


def gate(scored="choice", grouped=in_order, drop=fill, more=0, pick="topk"):
    """transformers' gate, taken apart: what groups are scored by, which experts they hold, how they are dropped, how many more
    of them are kept, what picks experts.
    """

    def wrap(own, forward):
        def route(x):
            import torch

            logits = torch.nn.functional.linear(x.view(-1, own.hidden_dim).float(), own.weight.float())
            scores = logits.sigmoid()
            choice = scores + own.e_score_correction_bias
            best = grouped({"scores": scores, "choice": choice}[scored], own.num_group).topk(2, dim=-1)[0].sum(-1)
            groups = torch.topk(best, own.topk_group + more, sorted=False)[1]
            kept = torch.zeros_like(best).scatter_(1, groups, 1).bool()
            spread = kept[..., None].expand(-1, -1, own.num_experts // own.num_group)
            final = drop(choice, back(spread, grouped))
            ids = (
                torch.topk(final, own.top_k, sorted=False)[1]
                if pick == "topk"
                else final.argsort(descending=True)[:, : own.top_k]
            )
            g = scores.gather(1, ids)
            return logits, g / (g.sum(-1, keepdim=True) + 1e-20) * own.routed_scaling_factor, ids

        return route

    return wrap


def told(net, case, **how):
    with one_thread(), with_forward(net, "mlp.gate", gate(**how)):
        trace = hf.trace_of(net, case)
    return judge(case, trace), trace


def computed(trace, case, layer):
    """router.choice in NumPy, from the scores that were recorded and the case's bias."""
    bias = case.weights()[f"model.layers.{layer}.mlp.gate.e_score_correction_bias"]
    return trace.taps[f"fwd/L{layer}/router.scores"] + np.asarray(bias, np.float32)


@pytest.mark.parametrize("drop", [fill, fill_in_place, assign, where, add, twice])
def test_every_way_to_drop_groups_shows_the_choice(drop, net, case):
    """Catches the masked numbers taken for the choice, and numbers that were written over before they were kept."""
    found, trace = told(net, case, drop=drop)
    assert found.verdict == "CONFORMS", render(found)
    np.testing.assert_array_equal(trace.taps["fwd/L1/router.choice"], computed(trace, case, 1))


@pytest.mark.parametrize(
    ("how", "blamed"),
    [
        ({"scored": "scores"}, {"router.group_scores"}),
        ({"grouped": round_robin}, {"router.group_scores", "router.ids"}),
        ({"more": 1}, {"router.groups", "router.ids"}),
        ({"drop": nothing}, {"router.ids"}),
    ],
)
def test_a_mistake_with_groups_is_not_one_of_the_choice(how, blamed, net, case):
    """Catches what groups are scored by taken for what experts are chosen by: the stage before the mistake would be blamed, and a
    bias that is there called absent.
    """
    found, trace = told(net, case, **how)
    assert {f.stage for f in found.culprits} <= blamed and found.culprits, render(found)
    assert "R18" not in [i for d in found.causes for i in d.ids]
    for layer in (1, 2):
        np.testing.assert_array_equal(trace.taps[f"fwd/L{layer}/router.choice"], computed(trace, case, layer))


@pytest.mark.parametrize("regime", ["one-group", "extreme-logits"])
def test_an_absent_bias_is_still_placed_at_the_choice(regime, tmp_path):
    """Catches ties of scores that are all 0 or 1 taken for dropped groups, and a choice looked for only where there are groups."""
    case = Case.read(new_case(tmp_path / "case", PRESETS["tiny"], regimes=regime, seed=1))
    with one_thread():
        net = hf_load.load_model(case.raw_config, case.weights())
        for bug, blamed in ((None, set()), ("R18", {"router.choice"})):
            with injected(net, bug):
                trace = hf.trace_of(net, case)
            found = judge(case, trace)
            assert set(trace.taps) == set(trace.header.expected)
            assert {f.stage for f in found.culprits} == blamed, render(found)


def test_a_choice_that_cannot_be_told_is_not_recorded(net, case):
    """Catches a guess: in layer 2 no topk is over the experts, so that no tensor is known to be what they are chosen by; and what
    layer 1 chose by taken for it.
    """
    with (
        one_thread(),
        with_forward(net, "mlp.gate", gate()),
        with_forward(net, "layers.2.mlp.gate", gate(pick="argsort")),
    ):
        trace = hf.trace_of(net, case)
    found = judge(case, trace)
    assert set(trace.header.expected) - set(trace.taps) == {"fwd/L2/router.choice"}
    assert "layers.2.mlp.gate: what the experts are chosen by, before groups are dropped, cannot" in trace.header.notes
    assert not found.culprits and found.verdict == "INCONCLUSIVE", render(found)


# ---- Numbers that leave more than one tensor to choose from: two tokens, two groups of two experts

OUT = -np.inf
NAN = np.nan
CHOICE, MASKED = [[4, 3, 2, 1], [1, 2, 3, 5]], [[4, 3, OUT, OUT], [OUT, OUT, 3, 5]]
NUMBERS = {  # tensors that a gate gives in turn, the last of which topk takes; whether groups are dropped; which of them it is
    "plain": ([CHOICE, MASKED], True, 0),
    "a bias of dropped experts only": ([[[4, 3, 7, 1], [1, 2, 3, 5]], CHOICE, MASKED], True, 1),
    "numbers by another bias": ([[[4, 3, 2, 1], [1, 2, 3, 4]], MASKED], True, None),
    "experts in another order": ([[[3, 4, 2, 1], [2, 1, 3, 5]], MASKED], True, None),
    "only what is masked": ([MASKED], True, None),
    "no groups are dropped though they should": ([CHOICE], True, 0),
    "ties, as of scores that are all 1": (
        [[[4, 3, 3, 3], [3, 3, 3, 5]], [[4, 3, OUT, OUT], [OUT, OUT, 3, 5]]],
        True,
        0,
    ),
    "ties, and no groups": ([[[1, 1, 1, 0], [1, 1, 0, 1]]], False, 0),
    "all alike": ([[[0] * 4] * 2, [[0.5] * 4] * 2], False, 1),
    "a token that is not a number": ([[[NAN] * 4, CHOICE[1]], [[NAN, NAN, OUT, OUT], MASKED[1]]], True, 0),
    "kept by 0, then by -inf": ([CHOICE, [[4, 3, 0, 0], [0, 0, 3, 5]], MASKED], True, 0),
}


@pytest.mark.parametrize("name", NUMBERS)
def test_the_choice_is_told_by_its_numbers(name):
    """Catches the wrong one of several tensors taken, or one where there is none."""
    import torch

    tensors, dropping, which = NUMBERS[name]
    made = [torch.tensor(t, dtype=torch.float32) for t in tensors]
    choosing = Choosing(2, 4)
    for t in made:
        choosing.see("add", Seen((), {}, t))
    choosing.see("topk", Seen((made[-1], 2), {}, torch.topk(made[-1], 2)))
    found = choosing.found(dropping)
    assert (found is None) == (which is None)
    np.testing.assert_array_equal(found, which if which is None else made[which].numpy())
