"""The losses of TRL 1.16 and the adapters of PEFT 0.21, on torch: they made golden/post.npz, and are asked again about other draws.

`pip install torch==2.13.0 transformers==5.23.0 trl==1.16.0 peft==0.21.2`, then `pytest` this file. TRL's losses are methods of its
trainers; they are called on stand-ins that hold the settings and give them the logits. To record anew:
`python -c "from refimpl.spec_tests.r5_post_training.test_interop_post import record; record()"`.
"""

import collections
import json
import shutil
import types

import numpy as np
import pytest

from refimpl.record import hf_load
from refimpl.spec_tests import golden
from refimpl.spec_tests.cases import post
from refimpl.train.post import lora, peft_format

# PEFT asks transformers for a property by its old name
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
LIMIT = 2e-5  # float32 in PEFT's model


@pytest.fixture(scope="module", autouse=True)
def _libraries():
    for name in ("torch", "transformers", "trl", "peft"):
        pytest.importorskip(name, reason="comes with the extra 'post'; the recorded cases stand in (test_recorded.py)")


# ---- What the libraries make of a case


class Local:
    """accelerate's Accelerator as one process sees it."""

    num_processes = 1

    def gather(self, x):
        return x

    gather_for_metrics = gather

    def reduce(self, x, reduction="sum"):
        return x

    device = "cpu"


def stand_in(**settings):
    """A trainer's `self`: the settings given, and nothing for the metrics it keeps beside the loss."""
    off = dict.fromkeys(("aux_loss_enabled", "use_vllm", "use_weighting", "_entropy_bonus_enabled"), False)
    none = dict.fromkeys(("ld_alpha", "off_policy_mask_threshold"))
    metrics = {m: collections.defaultdict(list) for m in ("train", "eval")}
    return types.SimpleNamespace(
        accelerator=Local(),
        model=types.SimpleNamespace(training=True),
        _metrics=metrics,
        _total_train_tokens=0,
        _tp_size=1,
        top_entropy_quantile=1.0,
        current_gradient_accumulation_steps=1,
        **off,
        **none,
        **settings,
    )


def logps(z, labels):
    """log p of the labels, 0 where none counts; torch, (B, S, V), (B, S) -> (B, S-1)."""
    import torch

    target = labels[:, 1:]
    p = torch.log_softmax(z[:, :-1], -1).gather(-1, target.clamp(min=0)[..., None])[..., 0]
    return p * (target != -100)


def trl_dpo(z, case):
    """DPOTrainer's sigmoid loss."""
    import torch
    from trl import DPOTrainer

    labels = torch.tensor(case["labels"])

    def model(input_ids, attention_mask, labels, **_):
        p = logps(z, labels)
        return types.SimpleNamespace(log_probs=p, entropy=0 * p, mean_logits=0 * p, is_top1=(p > 0))

    n = len(labels) // 2
    reference = logps(torch.tensor(case["reference"]), labels).sum(1)
    me = stand_in(
        beta=0.3,
        precompute_ref_logps=True,
        f_divergence_type="reverse_kl",
        loss_types=["sigmoid"],
        loss_weights=[1.0],
        label_smoothing=0.0,
    )
    inputs = {
        "input_ids": labels.clamp(min=0),
        "attention_mask": torch.ones_like(labels),
        "completion_mask": (labels != -100).long(),
        "ref_chosen_logps": reference[:n],
        "ref_rejected_logps": reference[n:],
    }
    return DPOTrainer._compute_loss(me, model, inputs, False)


def trl_grpo(z, case, name):
    """GRPOTrainer's loss of this loss_type; its advantages by the lines of `_generate_and_score_completions`."""
    import torch
    from trl import GRPOTrainer

    labels, variant = torch.tensor(case["labels"]), post.VARIANTS[name]
    mask = (labels != -100)[:, 1:].long()
    rewards = torch.tensor(case["rewards"])
    advantages = rewards - rewards.mean(1, keepdim=True)
    if name != "dr_grpo":  # scale_rewards="none" in its documentation of Dr. GRPO
        advantages = advantages / (rewards.std(1, keepdim=True) + 1e-4)
    me = stand_in(
        beta=variant.beta,
        importance_sampling_level="token",
        loss_type=name,
        epsilon_low=variant.clip[0],
        epsilon_high=variant.clip[1],
        max_completion_length=post.MOST,
        args=types.SimpleNamespace(use_bias_correction_kl=False, delta=None, steps_per_generation=1),
        _get_per_token_logps_and_entropies=lambda *_, **__: (logps(z, labels), torch.zeros(mask.shape), None),
    )
    known = {n: logps(torch.tensor(case[n]), labels) for n in ("old", "reference")}
    inputs = {
        "prompt_ids": labels[:, :1],
        "prompt_mask": torch.ones_like(labels[:, :1]),
        "completion_ids": labels[:, 1:],
        "completion_mask": mask,
        "advantages": advantages.reshape(-1),
        "old_per_token_logps": known["old"],
        "ref_per_token_logps": known["reference"],
        "num_items_in_batch": mask.sum(),
    }
    return GRPOTrainer._compute_loss(me, None, inputs)


def trl_kl(z, case, beta):
    """GKD's generalised divergence: beta 0 is the forward, 1 the reverse KL."""
    import torch
    from trl.experimental.gkd import GKDTrainer

    labels = torch.tensor(case["labels"])[:, 1:]
    teacher = torch.tensor(case["reference"])[:, :-1]
    return GKDTrainer.generalized_jsd_loss(z[:, :-1], teacher, labels=labels, beta=beta, temperature=1.5)


def hf_loss(z, case):
    """The loss that SFTTrainer takes from transformers."""
    import torch
    from transformers.loss.loss_utils import ForCausalLMLoss

    return ForCausalLMLoss(z, torch.tensor(case["labels"]), z.shape[-1])


def theirs(case):
    """As cases.post.ours, from the libraries."""
    import torch

    named = {
        "sft": hf_loss,
        "dpo": trl_dpo,
        "forward_kl": lambda z, c: trl_kl(z, c, 0),
        "reverse_kl": lambda z, c: trl_kl(z, c, 1),
        **{n: (lambda z, c, n=n: trl_grpo(z, c, n)) for n in post.VARIANTS},
    }
    found = {}
    for name, loss in named.items():
        leaf = torch.tensor(case["policy"], requires_grad=True)
        value = loss(leaf, case)
        value.backward()
        found |= {name: value.detach().numpy(), name + "/grad": leaf.grad.numpy()}
    return found


@pytest.mark.parametrize("seed", range(1, 6))
def test_losses_and_gradients_are_trls(seed):
    """Catches what the recorded draw does not reach: another row clipped, another length, a group with another spread."""
    case = post.draw(seed)
    mine, expected = post.ours(case), theirs(case)
    assert mine.keys() == expected.keys()
    for name, value in expected.items():
        tolerance = 2e-6 if name.startswith("sft") else 1e-12  # transformers' loss is float32 whatever it is given
        np.testing.assert_allclose(mine[name], value, rtol=0, atol=tolerance, err_msg=name)


# ---- PEFT


def peft_model(given=None, folder=None):
    """hf_tiny in transformers, with adapters given by name, or read from a folder by PEFT."""
    import peft
    import torch

    config, weights, _ = golden.case("hf_tiny")
    model = hf_load.load_model(config, weights)
    if folder is not None:
        return peft.PeftModel.from_pretrained(model, folder, is_trainable=True)
    settings = peft.LoraConfig(
        r=post.LORA.r, lora_alpha=post.LORA.alpha, target_modules=list(post.LORA.target_modules), task_type="CAUSAL_LM"
    )
    model = peft.get_peft_model(model, settings)
    state = {peft_format.PREFIX + n: torch.tensor(a) for n, a in given.items()}
    peft.set_peft_model_state_dict(model, state)
    return model


def peft_run(model):
    """(logits, loss, gradients by our names)."""
    import torch

    _, _, recorded = golden.case("hf_tiny")
    tokens, labels = (torch.tensor(recorded[n]).long() for n in ("input_ids", "labels"))
    out = model(input_ids=tokens, labels=labels)
    out.loss.backward()
    grads = {n: p.grad.numpy() for n, p in model.named_parameters() if p.requires_grad}
    named = {n.removeprefix(peft_format.PREFIX).replace(".default", ""): g for n, g in grads.items()}
    return out.logits.detach().numpy(), out.loss.detach().numpy(), named


def agree(found, expected):
    for mine, their in zip(found[:2], expected[:2], strict=True):
        np.testing.assert_allclose(
            mine, their, rtol=0, atol=5e-5
        )  # float32 there: golden/README.md, "how close to ask"
    assert found[2].keys() == expected[2].keys()
    for n, g in expected[2].items():
        np.testing.assert_allclose(found[2][n], g, rtol=0, atol=LIMIT * max(1, np.abs(g).max()), err_msg=n)


def test_adapted_model_is_pefts():
    """Catches alpha without r, A and B exchanged, a module adapted that PEFT leaves alone."""
    given = post.adapters(1)
    agree(post.adapted_model(given), peft_run(peft_model(given)))


def test_peft_reads_what_we_save(tmp_path):
    """Catches names, keys or values that PEFT does not take, and silently leaves at their start."""
    given = post.adapters(2)
    peft_format.save(tmp_path, given, post.LORA, base="hf_tiny")
    agree(post.adapted_model(given), peft_run(peft_model(folder=tmp_path)))


def test_we_read_what_peft_saves(tmp_path):
    """Catches a key that PEFT writes and we refuse, a name that we do not know."""
    given = post.adapters(3)
    peft_model(given).save_pretrained(tmp_path, save_embedding_layers=False)  # else it asks the network for a config
    found, mine = peft_format.load(tmp_path)
    assert found == lora.Lora(2, 3.0, tuple(sorted(post.LORA.target_modules)))
    assert mine.keys() == given.keys()
    for n, a in given.items():
        np.testing.assert_array_equal(mine[n], a)


# ---- Recording


def record():
    """Write golden/post.npz and the adapter that PEFT saves."""
    import tempfile

    logits, loss, grads = peft_run(peft_model(post.adapters()))
    lora_part = {"lora/logits": logits, "lora/loss": loss} | {f"lora/grad/{n}": g for n, g in grads.items()}
    np.savez_compressed(golden.file("post.npz"), **theirs(post.draw()), **lora_part)
    with tempfile.TemporaryDirectory() as folder:
        peft_model(post.adapters()).save_pretrained(folder, save_embedding_layers=False)
        for name in (peft_format.CONFIG, peft_format.TENSORS):
            shutil.copy(f"{folder}/{name}", golden.file(f"post.{name}"))
    config = golden.file(f"post.{peft_format.CONFIG}")
    config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": ""}, indent=1) + "\n")
