"""Small cases of post-training's losses, drawn from a seed, and what our functions make of them: value and gradient by name. Real
libraries made the same of them (golden/post.npz; test_interop_post.py).
"""

import numpy as np

from refimpl.autograd import Parameter, backward
from refimpl.layers import Config
from refimpl.layers import loss as losses
from refimpl.model import ForCausalLM
from refimpl.spec_tests import golden
from refimpl.train.post import distil, dpo, grpo, lora, sft
from refimpl.train.post.likelihood import counted, token_logp

LORA = lora.Lora(r=2, alpha=3.0, target_modules=("q_b_proj", "kv_b_proj", "self_attn.o_proj"))
MOST = 5  # Dr. GRPO's constant: an answer could have had so many tokens
VARIANTS = {"grpo": grpo.DEEPSEEK_MATH, "dr_grpo": grpo.dr_grpo(MOST), "dapo": grpo.DAPO}


def draw(seed=0, rows=6, length=7, vocab=11):
    """Logits of a policy, of the one that sampled, of a reference (B, S, V), labels (B, S) with prompts and padding of various
    lengths, rewards of two groups (2, B/2). Ratios leave the clipping range on both sides.
    """
    rng = np.random.default_rng(seed)
    policy = rng.normal(size=(rows, length, vocab))
    old, reference = (policy + s * rng.normal(size=policy.shape) for s in (0.3, 0.5))
    labels = rng.integers(0, vocab, (rows, length))
    for row in labels:
        row[: rng.integers(2, 4)] = -100
        row[length - rng.integers(0, 3) :] = -100
    return {
        "policy": policy,
        "old": old,
        "reference": reference,
        "labels": labels,
        "rewards": rng.normal(size=(2, rows // 2)),
    }


def ours(case):
    """{name: value, name/grad: gradient with respect to the policy's logits} of every loss."""
    labels, counts = case["labels"], counted(case["labels"])
    old, reference = (token_logp(case[n], labels) for n in ("old", "reference"))
    named = {
        "sft": lambda z: sft.loss(z, labels),
        "dpo": lambda z: dpo.loss(dpo.sequence_logp(z, labels), reference.sum(axis=1), beta=0.3),
        "forward_kl": lambda z: distil.forward_kl(z, case["reference"], labels, temperature=1.5),
        "reverse_kl": lambda z: distil.reverse_kl(z, case["reference"], labels, temperature=1.5),
    }
    for name, variant in VARIANTS.items():
        named[name] = lambda z, v=variant: grpo.loss(
            token_logp(z, labels),
            old,
            reference if v.beta else None,
            counts,
            grpo.advantages(case["rewards"], scaled=v.scaled).reshape(-1),
            variant=v,
        )
    found = {}
    for name, loss in named.items():
        leaf = Parameter(case["policy"])
        value = loss(leaf)
        found |= {name: value.data, name + "/grad": backward(value)[leaf]}
    return found


def adapters(seed=0):
    """LoRA matrices for hf_tiny's attention, none of them 0."""
    _, weights, _ = golden.case("hf_tiny")
    rng = np.random.default_rng(seed)
    start = lora.init(LORA, weights)
    return {n: (0.3 * rng.normal(size=a.shape)).astype(np.float32) for n, a in start.items()}


def adapted_model(given):
    """(logits, loss, {adapter's name: gradient}) of hf_tiny with these adapters in float64, on its recorded tokens."""
    config, weights, recorded = golden.case("hf_tiny")
    leaves = {n: Parameter(a.astype(np.float64)) for n, a in given.items()}
    weights = {n: w.astype(np.float64) for n, w in weights.items()}
    model = ForCausalLM.from_weights(Config.from_dict(config), lora.adapted(weights, leaves, LORA.scale))
    out = model(model.inputs(recorded["input_ids"]))
    loss = losses.main(out.logits, recorded["labels"])
    grads = backward(loss)
    return out.logits.data, loss.data, {n: grads[leaf] for n, leaf in leaves.items()}
