"""R 5.2: rewards by rule, group relative policy optimisation."""

import math
from dataclasses import replace

import numpy as np
import pytest

from refimpl.autograd import Parameter, SpecError, backward, directional
from refimpl.infer import Settings
from refimpl.layers.precision import BF16, FLOAT32
from refimpl.spec_tests.cases import toys
from refimpl.train import State, init
from refimpl.train.post import grpo, grpo_step, rewards

NAMED = {"v3": grpo.V3, "deepseek_math": grpo.DEEPSEEK_MATH, "dapo": grpo.DAPO, "dr_grpo": grpo.dr_grpo(9)}


def draw(seed=0, n=6, t=5):
    """Log-probabilities under three policies, which tokens count, advantages."""
    rng = np.random.default_rng(seed)
    logp = -rng.exponential(size=(n, t))
    counts = (np.arange(t) < rng.integers(1, t + 1, n)[:, None]).astype(float)
    logp, old, reference = (
        p * counts for p in (logp, logp + 0.2 * rng.normal(size=(n, t)), logp + rng.normal(size=(n, t)))
    )
    return logp, old, reference, counts, rng.normal(size=n)


def by_hand(logp, old, reference, counts, advantage, v):
    """-J one answer and one token at a time."""
    answers, tokens = [], 0
    for i in range(len(logp)):
        words = [t for t in range(logp.shape[1]) if counts[i, t]]
        spans = [words] if v.ratio == "answer" else [[t] for t in words]
        terms = []
        for span in spans:
            p, o, r = (math.fsum(a[i, t] for t in span) for a in (logp, old, reference))
            rho, a = math.exp(p) / math.exp(o), advantage[i]
            gain = min(rho * a, min(max(rho, 1 - v.clip[0]), 1 + v.clip[1]) * a)
            q = math.exp(r) / math.exp(p)
            terms.append(gain - v.beta * (q - math.log(q) - 1))
        answers.append(terms)
        tokens += len(spans)
    if v.average == "answer":
        return -math.fsum(math.fsum(terms) / len(terms) for terms in answers) / len(answers)
    return -math.fsum(math.fsum(terms) for terms in answers) / (
        tokens if v.average == "token" else len(answers) * v.longest
    )


@pytest.mark.parametrize("name", NAMED)
@pytest.mark.parametrize("seed", range(3))
def test_the_objective(name, seed):
    """Catches max for min, one clip for both sides, KL added to the gain, padding in the ratio of an answer, the wrong divisor."""
    case = draw(seed)
    np.testing.assert_allclose(grpo.loss(*case, variant=NAMED[name]), by_hand(*case, NAMED[name]), rtol=1e-12)


@pytest.mark.parametrize("name", NAMED)
def test_the_gradient(name):
    """Catches a gradient through the clipped ratio. Central differences in float64 err by some 1e-9; no draw lies on a corner."""
    logp, *others = draw(7)
    assert directional(lambda p: grpo.loss(p, *others, variant=NAMED[name]), logp) < 1e-7


def test_advantages_of_a_group():
    """R eq 28. Catches groups mixed, a deviation with n, equal rewards that give NaN or teach."""
    found = grpo.advantages(np.array([[1.0, 0.0, 0.0, 1.0], [3.0, 3.0, 3.0, 3.0], [0.0, 0.0, 0.0, 8.0]]))
    deviation = math.sqrt(4 * 0.25 / 3) + 1e-4
    np.testing.assert_allclose(found[0], np.array([0.5, -0.5, -0.5, 0.5]) / deviation, rtol=1e-12)
    assert not found[1].any()
    np.testing.assert_allclose(found[2], np.array([-2, -2, -2, 6]) / (4 + 1e-4), rtol=1e-12)
    np.testing.assert_array_equal(grpo.advantages(np.array([[1.0, 0.0]]), scaled=False), [[0.5, -0.5]])


def test_the_kl_estimator_is_unbiased_and_never_negative():
    """R eq 27: its mean over all tokens, weighted by the policy, is KL(policy || reference). Catches the ratio upside down."""
    rng = np.random.default_rng(1)
    p, q = rng.dirichlet(np.ones(9), 2)
    terms = grpo.kl(np.log(p), np.log(q))
    assert (terms >= 0).all()
    np.testing.assert_allclose(
        (p * terms).sum(), math.fsum(a * math.log(a / b) for a, b in zip(p, q, strict=True)), rtol=1e-12
    )


def test_the_first_step_is_the_policy_gradient():
    """With the policy that sampled, d loss / d logp = -A / (N |o|). Catches a gradient that vanishes at ratio 1."""
    logp, _, _, counts, advantage = draw(3)
    leaf, variant = Parameter(logp), replace(grpo.DEEPSEEK_MATH, beta=0.0)
    found = backward(grpo.loss(leaf, logp, None, counts, advantage, variant=variant))[leaf]
    expected = -advantage[:, None] * counts / (len(logp) * counts.sum(axis=1, keepdims=True))
    np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_what_is_refused():
    """Catches shapes that broadcast to nonsense, a KL term without reference, answers without a token, groups of one."""
    logp, old, reference, counts, advantage = draw()
    with pytest.raises(SpecError, match="needs the reference"):
        grpo.loss(logp, old, None, counts, advantage)
    with pytest.raises(SpecError, match="advantage"):
        grpo.loss(logp, old, reference, counts, advantage[:, None])
    with pytest.raises(SpecError, match="no token that counts"):
        grpo.loss(logp, old, reference, counts * 0, advantage)
    with pytest.raises(SpecError, match="G at least 2"):
        grpo.advantages(np.zeros((3, 1)))
    with pytest.raises(SpecError, match="NaN"):
        grpo.advantages(np.array([[1.0, np.nan]]))
    with pytest.raises(SpecError, match="needs longest"):
        grpo.Variant(average="constant")
    with pytest.raises(SpecError, match="expected answer or token"):
        grpo.Variant(ratio="sequence")


# ---- Rewards


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (r"so \boxed{42}.", "42"),
        (r"\boxed{1}, no: \boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{1} or \boxed{2", "1"),
        ("42", None),
        (r"\boxed{}", ""),
    ],
)
def test_the_boxed_answer(text, found):
    """Catches the first box for the last, a box that ends at an inner brace, one that never ends."""
    assert rewards.boxed(text) == found


def test_rewards_by_rule():
    """Catches the answer outside the box, blanks that count, a long answer that hides a right one in front."""
    assert rewards.accuracy(r"thus \boxed{x = 3}", "x=3") == 1
    assert rewards.accuracy("x=3", "x=3") == rewards.accuracy(r"\boxed{4}", "3") == 0
    assert rewards.overlap([1, 2, 3, 4], [1, 2]) == rewards.overlap([1], [1, 2]) == 0.5
    assert rewards.overlap([], []) == 0


# ---- A toy: say the prompt's token three times

SETTINGS = Settings(max_tokens=3)
PROMPTS = [[i] for i in range(toys.SYMBOLS)]


def repeats(prompt, answer):
    return rewards.overlap(answer, [prompt[0]] * 3)


def run(variant, rounds=30):
    """Mean reward by round."""
    start = init(toys.TOY, std=0.1)
    state, means = State(start), []
    for i in range(rounds):
        settings = replace(SETTINGS, seed=1000 * i)
        seen = grpo_step.rollout(toys.TOY, state, start, PROMPTS, repeats, settings, group=8, plan=FLOAT32)
        means.append(seen.rewards.mean())
        for _ in range(2):
            state, _ = grpo_step.update(toys.TOY, state, seen, toys.RECIPE, variant=variant)
    return np.array(means)


@pytest.mark.parametrize("name", [n if n == "v3" else pytest.param(n, marks=pytest.mark.slow) for n in NAMED])
def test_the_reward_rises(name):
    """Catches a step up the loss, advantages given to the wrong answers, answers not those that were rewarded. By chance 1/12."""
    means = run(NAMED[name] if name != "dr_grpo" else grpo.dr_grpo(3))
    assert means[0] < 0.25 and means[-5:].mean() > 0.8


@pytest.mark.parametrize("plan", [FLOAT32, BF16], ids=lambda p: p.name)
def test_the_first_ratio_is_one_under_the_plan_of_the_step(plan):
    """Catches an old policy computed in another precision than the step: a first loss is minus the mean
    advantage, 0.
    """
    state = State(init(toys.TOY, std=0.1))
    seen = grpo_step.rollout(toys.TOY, state, None, PROMPTS[:2], repeats, SETTINGS, group=4, plan=plan)
    variant = replace(grpo.DEEPSEEK_MATH, beta=0.0)
    _, report = grpo_step.update(toys.TOY, state, seen, replace(toys.RECIPE, plan=plan), variant=variant)
    assert abs(report.loss) < 1e-7  # float32 sum of 8 numbers of order 0.1


def test_a_group_is_answers_to_one_prompt():
    """Catches groups that mix prompts, rewards in another order than their rows, an answer that is not scored by its own tokens."""
    start, asked = init(toys.TOY, std=0.1), []

    def reward(prompt, answer):
        asked.append((list(prompt), list(answer)))
        return prompt[0] + answer[0] / 100

    seen = grpo_step.rollout(toys.TOY, State(start), start, PROMPTS[:3], reward, SETTINGS, group=4, plan=FLOAT32)
    np.testing.assert_array_equal(seen.rewards.astype(int), [[0] * 4, [1] * 4, [2] * 4])
    for row, (prompt, answer) in enumerate(asked):
        assert seen.batch.tokens[row].tolist() == [*prompt, *answer]
        assert seen.rewards.reshape(-1)[row] == prompt[0] + answer[0] / 100
    np.testing.assert_array_equal(seen.old, seen.reference)
    assert len({tuple(answer) for _, answer in asked}) > 6  # drawn apart: of 12 answers to 3 prompts few are alike


@pytest.mark.parametrize(("variant", "factor"), [(grpo.dr_grpo(3), 10.0), (grpo.DAPO, 1.0)], ids=["dr_grpo", "dapo"])
def test_only_an_unscaled_advantage_grows_with_the_rewards(variant, factor):
    """Catches Dr. GRPO with the deviation divided out after all. The deviation's 1e-4 is a thousandth of the smallest."""
    norms = []
    for size in (1.0, 10.0):
        state = State(init(toys.TOY, std=0.1))
        seen = grpo_step.rollout(
            toys.TOY,
            state,
            None,
            PROMPTS,
            lambda p, a, size=size: size * repeats(p, a),
            SETTINGS,
            group=8,
            plan=FLOAT32,
        )
        norms.append(grpo_step.update(toys.TOY, state, seen, toys.RECIPE, variant=variant)[1].norm)
    assert norms[1] / norms[0] == pytest.approx(factor, rel=2e-3)


def test_a_group_of_equal_rewards_teaches_nothing():
    """Catches a gradient made of rounding: where every answer is rewarded alike the loss has none but the KL's, absent here."""
    state = State(init(toys.TOY, std=0.1))
    seen = grpo_step.rollout(toys.TOY, state, None, PROMPTS[:2], lambda p, a: 0.3, SETTINGS, group=4, plan=FLOAT32)
    _, report = grpo_step.update(toys.TOY, state, seen, toys.RECIPE, variant=grpo.DAPO)
    assert report.norm == 0
    with pytest.raises(SpecError, match="a group of 1"):
        grpo_step.rollout(toys.TOY, state, None, PROMPTS, repeats, SETTINGS, group=1, plan=FLOAT32)
