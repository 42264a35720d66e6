"""Losses and gradients as TRL 1.16, transformers 5.23.0 and PEFT 0.21 made them (golden/post.npz), without those libraries."""

import json
import shutil

import numpy as np
import pytest

from refimpl.autograd import SpecError
from refimpl.spec_tests import golden
from refimpl.spec_tests.cases import post
from refimpl.train.post import lora, peft_format

MINE = post.ours(post.draw())


@pytest.mark.parametrize("name", ["sft", "dpo", "forward_kl", "reverse_kl", *post.VARIANTS])
def test_loss_and_gradient(name):
    """Catches a mean over rows for one over tokens, chosen and rejected exchanged, KL the wrong way round, a clip on one side only,
    a deviation with n. Float64 in both; transformers' own loss is float32.
    """
    recorded, tolerance = golden.arrays("post"), 2e-6 if name == "sft" else 1e-12
    for key in (name, name + "/grad"):
        np.testing.assert_allclose(MINE[key], recorded[key], rtol=0, atol=tolerance)


def test_the_recorded_draw_reaches_both_ends_of_the_clipping_range():
    """Catches a golden case in which nothing is clipped, so that no clip could be wrong."""
    case = post.draw()
    p, old = (post.token_logp(case[n], case["labels"]) for n in ("policy", "old"))
    ratio = np.exp(p - old)[post.counted(case["labels"])]
    assert (ratio < 0.8).any() and (ratio > 1.28).any() and ((ratio > 1.2) & (ratio < 1.28)).any()


def test_adapted_model():
    """Catches alpha without r, A and B exchanged, an adapted module left out. Tolerances: golden/README.md."""
    recorded = golden.arrays("post")
    logits, loss, grads = post.adapted_model(post.adapters())
    np.testing.assert_allclose(logits, recorded["lora/logits"], rtol=0, atol=5e-5)
    np.testing.assert_allclose(loss, recorded["lora/loss"], rtol=0, atol=2e-6)
    assert {f"lora/grad/{n}" for n in grads} == {k for k in recorded if k.startswith("lora/grad/")}
    for n, g in grads.items():
        their = recorded[f"lora/grad/{n}"]
        np.testing.assert_allclose(g, their, rtol=0, atol=2e-5 * max(1, np.abs(their).max()), err_msg=n)


def peft_folder(tmp_path, **changes):
    """The adapter that PEFT saved, under the names that PEFT gave it."""
    config = json.loads((golden.file(f"post.{peft_format.CONFIG}")).read_text())
    (tmp_path / peft_format.CONFIG).write_text(json.dumps(config | changes))
    shutil.copy(golden.file(f"post.{peft_format.TENSORS}"), tmp_path / peft_format.TENSORS)
    return tmp_path


def test_an_adapter_that_peft_saved(tmp_path):
    """Catches a key of PEFT's that is refused, a name that is not known, numbers that change on the way."""
    found, mine = peft_format.load(peft_folder(tmp_path))
    assert found == lora.Lora(2, 3.0, tuple(sorted(post.LORA.target_modules)))
    assert mine.keys() == post.adapters().keys()
    for n, a in post.adapters().items():
        np.testing.assert_array_equal(mine[n], a)


def test_what_we_save_has_pefts_names_and_bytes(tmp_path):
    """Catches a prefix or suffix that PEFT would not find: it starts such adapters anew, with a warning only."""
    peft_format.save(tmp_path, post.adapters(), post.LORA)
    ours, theirs = (
        golden.tensors(f) for f in (tmp_path / peft_format.TENSORS, golden.file(f"post.{peft_format.TENSORS}"))
    )
    assert ours.keys() == theirs.keys()
    for n in ours:
        np.testing.assert_array_equal(ours[n], theirs[n])
    config, recorded = (
        json.loads(f.read_text()) for f in (tmp_path / peft_format.CONFIG, golden.file(f"post.{peft_format.CONFIG}"))
    )
    same = set(config) - {"target_modules"}  # PEFT writes a set, in any order
    assert same <= set(recorded) and all(config[k] == recorded[k] for k in same)
    assert set(config["target_modules"]) == set(recorded["target_modules"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "PROMPT_TUNING"}, "expected LORA"),
        ({"use_dora": True}, "use_dora: set"),
        ({"use_rslora": True}, "use_rslora: set"),
        ({"bias": "all"}, "bias: set"),
        ({"rank_pattern": {"o_proj": 4}}, "rank_pattern: set"),
        ({"r": 4}, "rank 2, not 4"),
        ({"r": None}, "r is None"),
        ({"lora_alpha": -1}, "alpha is -1"),
        ({"target_modules": 3}, "target_modules is 3"),
    ],
)
def test_adapters_that_are_refused(tmp_path, changes, message):
    """Catches an adapter of another kind that is read as plain LoRA and computes something else."""
    with pytest.raises(SpecError, match=message):
        peft_format.load(peft_folder(tmp_path, **changes))


def test_files_that_are_refused(tmp_path):
    """Catches a bare FileNotFoundError, half an adapter, another library's names."""
    with pytest.raises(SpecError, match="cannot be read"):
        peft_format.load(tmp_path)
    given = post.adapters()
    half = {n: a for n, a in given.items() if "lora_B" in n}
    with pytest.raises(SpecError, match="not a pair"):
        peft_format.save(tmp_path, half, post.LORA)
    with pytest.raises(SpecError, match="no adapters"):
        peft_format.save(tmp_path, {}, post.LORA)
    with pytest.raises(SpecError, match="the config says 3"):
        peft_format.save(tmp_path, given, lora.Lora(3, 3.0, ("o_proj",)))
    assert not list(tmp_path.iterdir())
