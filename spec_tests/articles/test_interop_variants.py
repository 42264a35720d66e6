"""The variants that torch or transformers have too, in both: values and gradients in float64, or float32 for transformers' CLIP.

`pip install torch==2.13.0 transformers==5.23.0`, then `pytest` this file. 1e-12 is the rounding of sums of at most 16 terms.
"""

import numpy as np
import pytest

from refimpl.autograd import Tensor, backward
from refimpl.layers import STAGES

CLOSE = {"rtol": 1e-12, "atol": 1e-14}
PRINTED = np.where(np.subtract.outer(np.arange(12), np.arange(12)) > 5, 0, 1)
"""Article 4's mask over query minus key."""


@pytest.fixture(scope="module", autouse=True)
def _libraries():
    for name in ("torch", "transformers"):
        pytest.importorskip(name, reason="comes with the extra 'interop'; CI runs these tests with it")


@pytest.fixture
def rng():
    return np.random.default_rng(31)


def stage(name):
    return STAGES[f"variant.{name}"]


def agree(ours, theirs, *arrays, seed=0):
    """Value and gradient by every array of `ours`, on Tensors, and of `theirs`, on torch's."""
    import torch

    leaves, mirrors = [Tensor(a) for a in arrays], [torch.tensor(a, requires_grad=True) for a in arrays]
    y, expected = ours(*leaves), theirs(*mirrors)
    np.testing.assert_allclose(y.data, expected.detach().numpy(), **CLOSE)
    dy = np.random.default_rng(seed).normal(size=y.shape)
    grads = backward(y, dy)
    expected.backward(torch.tensor(dy))
    for leaf, mirror in zip(leaves, mirrors, strict=True):
        np.testing.assert_allclose(grads[leaf], mirror.grad.numpy(), **CLOSE)


@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize("tau", [0.3, 1.0, 4.0])
def test_gumbel_softmax(tau, hard, rng):
    """Catches another place for the temperature or the noise, and a straight-through gradient that is not torch's."""
    import torch

    z = rng.normal(size=(2, 3, 6))
    torch.manual_seed(5)
    noise = -torch.empty(2, 3, 6, dtype=torch.float64).exponential_().log()  # as F.gumbel_softmax draws it

    def theirs(z):
        torch.manual_seed(5)
        return torch.nn.functional.gumbel_softmax(z, tau=tau, hard=hard)

    agree(lambda z: stage("gumbel")(z, noise.numpy(), tau=tau, straight_through=hard), theirs, z)


def test_gates_by_topk(rng):
    """Catches a mask that torch.topk would not make; the repaired gate as a softmax over -inf elsewhere."""
    import torch

    z = rng.normal(size=(1, 5, 8))
    best = torch.topk(torch.tensor(z), 2).indices
    ones = torch.zeros(1, 5, 8, dtype=torch.float64).scatter_(-1, best, 1) / 2
    np.testing.assert_array_equal(stage("top2_ones")(z), ones.numpy())
    agree(
        stage("top2_renormalised"),
        lambda z: torch.softmax(z.masked_fill(ones == 0, -torch.inf), dim=-1),
        z,
    )
    agree(lambda z: stage("temperature")(z, tau=0.6), lambda z: torch.softmax(z / 0.6, dim=-1), z)


@pytest.mark.parametrize("scale", [2.0, 9.0])
def test_contrastive_loss(scale, rng):
    """Catches a loss that is not the mean of torch's two cross-entropies, by images, texts and the learned scale (9: limited)."""
    import torch
    from torch.nn import functional

    def theirs(image, text, t):
        image, text = (functional.normalize(x, dim=-1) for x in (image, text))
        z = image @ text.T * t.exp().clamp(max=100)
        pairs = torch.arange(len(z))
        return (functional.cross_entropy(z, pairs) + functional.cross_entropy(z.T, pairs)) / 2

    def ours(*args):
        return stage("clip_loss")(stage("clip_logits")(*args))

    agree(ours, theirs, rng.normal(size=(5, 4)), rng.normal(size=(5, 4)), np.array(scale))


def test_a_whole_clip(rng):
    """Catches what CLIP's own model has and our head has not: logits and loss of transformers' CLIPModel, drawn small, float32."""
    import torch
    from transformers import CLIPConfig, CLIPModel

    part = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = CLIPConfig(
        text_config=part | {"vocab_size": 20, "eos_token_id": 19, "max_position_embeddings": 8},
        vision_config=part | {"image_size": 8, "patch_size": 4},
        projection_dim=8,
    )
    torch.manual_seed(0)
    model = CLIPModel(config).eval()
    tokens = torch.tensor(rng.integers(0, 18, (6, 7)))
    tokens[:, -1] = 19
    images = torch.tensor(rng.normal(size=(6, 3, 8, 8)), dtype=torch.float32)
    with torch.no_grad():
        out = model(input_ids=tokens, pixel_values=images, return_loss=True)
    args = [x.detach().numpy() for x in (out.image_embeds, out.text_embeds, model.logit_scale)]
    z = stage("clip_logits")(*args)
    np.testing.assert_allclose(z, out.logits_per_image.numpy(), rtol=2e-5, atol=2e-5)  # float32, logits of up to 14
    assert float(stage("clip_loss")(z)) == pytest.approx(float(out.loss), rel=2e-5)


@pytest.mark.parametrize("window", [1, 3, 12, 40])
def test_sliding_window(window):
    """Catches a window of one more or less than transformers' models have."""
    import torch
    from transformers.masking_utils import sliding_window_causal_mask_function

    seen = sliding_window_causal_mask_function(window)
    q, k = torch.arange(12)[:, None], torch.arange(12)[None]
    causal = np.where(np.tri(12), 0.0, -np.inf)[None, None]
    np.testing.assert_array_equal(stage("sliding_window")(causal, window=window)[0, 0] == 0, seen(0, 0, q, k).numpy())


def test_torch_itself_reads_the_printed_mask_both_ways(rng):
    """Catches readings of the 1s that torch has not: its attention function attends there, its attention layer hides it."""
    import torch

    q, k, v = rng.normal(size=(3, 1, 1, 12, 4))
    ones = torch.tensor(PRINTED == 1)
    free = np.zeros((1, 1, 12, 12))

    def ours(ones):
        s = q @ k.swapaxes(-1, -2) / 2 + stage("distance_mask")(free, ones=ones)
        return STAGES["mla.probs"](s)

    y = torch.nn.functional.scaled_dot_product_attention(*map(torch.tensor, (q, k, v)), attn_mask=ones)
    np.testing.assert_allclose(ours("attend") @ v, y.numpy(), **CLOSE)

    layer = torch.nn.MultiheadAttention(4, 1, batch_first=True, dtype=torch.float64)
    x = torch.tensor(rng.normal(size=(1, 12, 4)))
    _, p = layer(x, x, x, attn_mask=ones)
    far = stage("distance_mask")(free, ones="hide")[0, 0] == 0
    np.testing.assert_array_equal(p[0, 6:].detach().numpy() > 0, far[6:])
    assert (
        torch.isnan(p[0, :6]).all() and not ours("hide")[0, 0, :6].any()
    )  # nothing to attend to: NaN there, zeros here


def test_confidence(rng):
    """Catches another gradient than that of torch's maximum of a softmax."""
    import torch

    agree(stage("confidence"), lambda z: torch.softmax(z, -1).max(-1).values, rng.normal(size=(2, 3, 5)))
