"""Which known bugs a model can have, which choices a wrong rule of choosing allows; and that none of them goes unchecked."""

import itertools

import numpy as np
import pytest

from refimpl.diff.corpus import MUTANTS, Best
from refimpl.layers import PRESETS
from refimpl.layers.rope import RopeScaling

from . import test_corpus_experts, test_corpus_formulas, test_corpus_steps


def test_every_known_bug_has_a_formula():
    """Catches a new bug that nobody wrote down a second time. Products in FP8 all read their scales by the same four mistakes."""
    parts = (*test_corpus_formulas.PARTS, *test_corpus_experts.PARTS, *test_corpus_steps.PARTS)
    left = MUTANTS.keys() - {id.partition("/")[0] for part in parts for id, *_ in part()}
    assert {id.partition("-")[0] for id in left} == {"F12", "F12b", "F11", "F16"}


YARN = {"A04", "A05", "A09b", "A06", "A06b", "A11", "A10", "A11b"}
UNEVEN = {"A05b", "A06c", "A11c"}
BIAS, GROUPS = {"R01", "R05", "R14", "R18", "X03", "X44"}, {"R02", "R03", "R04c", "R15", "R15c", "X06", "X09"}
BOTH = {"X08", "X08-seen", "X09-seen"}
"""What takes groups and a bias."""
SHARED, MTP = {"R16", "R17", "X32", "X33", "X41"}, {"T01", "T03", "T08"}
MODEL = PRESETS["tiny"].replace(
    rope_scaling=RopeScaling(factor=40.0, original_max_position_embeddings=64, mscale=1.0, mscale_all_dim=1.0),
    n_routed_experts=16,
    num_experts_per_tok=4,
    n_group=4,
    topk_group=2,
    n_shared_experts=1,
    q_lora_rank=24,
    num_nextn_predict_layers=1,
    routed_scaling_factor=2.5,
    norm_topk_prob=True,
    scoring_func="sigmoid",
    topk_method="noaux_tc",
)
OWN = YARN | BIAS | GROUPS | BOTH | SHARED | MTP | {"R07", "R09b", "A13", "A13e"}
"""What MODEL can have, of what not every model can."""
SOMETIMES = (
    UNEVEN | {"R04b", "R07b", "R08", "X07", "X11c", "A13d", "T08b"} | {id for id in MUTANTS if id.startswith("R15b")}
)
FORMS = {id.removesuffix("-absorbed") for id in MUTANTS if id.endswith("-absorbed")}
"""What the absorbed form of attention can have as well, in every model that can have it expanded."""

ONE_GROUP = {"n_group": 1, "topk_group": 1}
MODELS = {
    "as it is": ({}, set(), set()),
    "RoPE without YaRN": ({"rope_scaling": None}, YARN, set()),
    "YaRN of factor 1": ({"rope_scaling": RopeScaling(factor=1.0, mscale=0.7, mscale_all_dim=1.0)}, YARN, set()),
    "uneven mscales": ({"rope_scaling": RopeScaling(factor=4.0, mscale=0.7, mscale_all_dim=1.0)}, set(), UNEVEN),
    "another theta": ({"rope_theta": 5e5}, {"X11b"}, {"X11c"}),
    "softmax": ({"scoring_func": "softmax"}, {"X44"}, {"R04b"}),
    "greedy": ({"topk_method": "greedy"}, BIAS | GROUPS | BOTH, set()),
    "greedy, one group": ({"topk_method": "greedy"} | ONE_GROUP, BIAS | GROUPS | BOTH, set()),
    "groups without bias": ({"topk_method": "group_limited_greedy"}, BIAS | BOTH, set()),
    "no groups": (ONE_GROUP, GROUPS | BOTH, {id for id in MUTANTS if id.startswith("R15b")}),
    "no groups, 5 of 16 experts": (
        ONE_GROUP | {"num_experts_per_tok": 5},
        GROUPS | BOTH,
        {"R15b", "R15b-8-3", "R15b-4-3", "R15b-4-2", "R15b-2-1"},
    ),
    "no groups, 3 of 12 experts": (
        ONE_GROUP | {"n_routed_experts": 12, "num_experts_per_tok": 3},
        GROUPS | BOTH,
        {"R15b-4-3", "R15b-4-2", "R15b-4-1", "R15b-2-1"},
    ),
    "no groups, 5 of 8 experts": (
        ONE_GROUP | {"n_routed_experts": 8, "num_experts_per_tok": 5},
        GROUPS | BOTH,
        {"R15b-4-3"},
    ),
    "weights as they are": ({"norm_topk_prob": False}, {"R07"}, {"R07b", "R08"}),
    "another factor": ({"routed_scaling_factor": 1.5}, {"R09b"}, {"X07"}),
    "no shared expert": ({"n_shared_experts": 0}, SHARED, set()),
    "two shared experts": ({"n_shared_experts": 2}, set(), set()),
    "queries of full rank": ({"q_lora_rank": None}, {"A13", "A13e"}, {"A13d"}),
    "no MTP": ({"num_nextn_predict_layers": 0}, MTP, set()),
    "two MTP modules": ({"num_nextn_predict_layers": 2}, set(), {"T08b"}),
}
"""What is changed of MODEL, the bugs that it then cannot have, and those that it can."""


@pytest.mark.parametrize("name", MODELS)
def test_a_bug_is_looked_for_where_a_model_has_what_it_spoils(name):
    """Catches a model in which a known bug is not looked for, or one that is looked for where it is no other computation."""
    changes, less, more = MODELS[name]
    always = {id for id in MUTANTS if not id.endswith("-absorbed")} - OWN - SOMETIMES
    model = MODEL.replace(**changes)
    expected = (always | OWN | more) - less
    expected |= {f"{id}-absorbed" for id in expected & FORMS}
    assert {id for id, m in MUTANTS.items() if m.applies(model)} == expected


def test_a_choice_is_allowed_if_nothing_better_is_left():
    """Catches an expert chosen twice, one that is worse than one left out; a tie that must fall one way. Oracle: every choice of
    three of five experts, with ties, in any order.
    """
    for scores in ([3, 1, 2, 2, 0], [1, 1, 1, 1, 1], [5, 4, 3, 2, 1], [0, 2, 2, 2, 2]):
        a = np.array(scores, float)
        for ids in itertools.product(range(5), repeat=3):
            left = [s for i, s in enumerate(scores) if i not in ids]
            good = len(set(ids)) == 3 and min(scores[i] for i in ids) >= max(left)
            assert Best(lambda a: a).allows(np.array([ids, [0, 1, 2]]), np.array([a, [9, 8, 7, 0, 0]])) == good, (
                scores,
                ids,
            )
