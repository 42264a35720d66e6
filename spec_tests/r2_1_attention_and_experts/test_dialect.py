"""Every point where public implementations differ is an option that does something.

One function per option: it returns what the default gives and what each alternative gives, and the
alternatives must differ. Where the difference is a matter of definition, the function says which.
"""

import dataclasses
import typing

import numpy as np
import pytest

from refimpl.layers import Config, Dialect, loss, router
from refimpl.layers.rope import RopeScaling
from refimpl.spec_tests.cases.small_models import SMALL, logits, small, some_tokens

from .test_router import gate_of

TOKENS = some_tokens(2, 8)


def mtp_hidden(value):
    """Depth 1 hears of the final norm's weight, or does not."""
    model = small(num_nextn_predict_layers=1, dialect=Dialect(mtp_hidden=value))
    return model(model.inputs(TOKENS), with_mtp=True).mtp_logits[0]


def mtp_recycle(value):
    """Only depth 2 can tell."""
    model = small(num_nextn_predict_layers=2, dialect=Dialect(mtp_recycle=value))
    first, second = model(model.inputs(TOKENS), with_mtp=True).mtp_logits
    default = small(num_nextn_predict_layers=2)
    np.testing.assert_array_equal(first, default(default.inputs(TOKENS), with_mtp=True).mtp_logits[0])
    return second


def mtp_concat(value):
    model = small(num_nextn_predict_layers=1, dialect=Dialect(mtp_concat=value))
    return model(model.inputs(TOKENS), with_mtp=True).mtp_logits[0]


def mtp_loss_mean(value):
    """T/(T-k): seven main labels, six of depth 1."""
    y = np.random.default_rng(0).standard_normal((1, 7, 5))
    labels = np.arange(8)[None] % 5
    given = loss.mtp(y, labels, depth=1, mean=value)
    assert abs(given / loss.mtp(y, labels, depth=1, mean="valid") - {"valid": 1, "length": 6 / 7}[value]) < 1e-12
    return given


def latent_norm_eps(value):
    """Only if rms_norm_eps is not 1e-6 itself."""
    return logits(small(rms_norm_eps=1e-2, dialect=Dialect(latent_norm_eps=value)), TOKENS)


def topk_denominator_eps(value):
    """Only if the selected scores vanish; 0/0 in test_router.py, 1e-30 here."""
    gate = gate_of(dialect=Dialect(topk_denominator_eps=value))
    return gate(np.full((1, 1, 12), -60.0)).weights


def masked_group_fill(value):
    """Only if biased scores are negative."""
    gate = gate_of(np.full(12, -2.0), dialect=Dialect(masked_group_fill=value))
    return gate(np.linspace(2, -2, 12)[None, None]).ids


def yarn_applies(value):
    """Only if the context is not longer than the original one."""
    short = {"max_position_embeddings": 64, "rope_scaling": RopeScaling(original_max_position_embeddings=64)}
    config = SMALL.replace(dialect=Dialect(yarn_applies=value), **short)
    assert (config.yarn is None) == (value == "beyond_original")
    long = config.replace(max_position_embeddings=65)
    assert long.yarn is not None
    return logits(small(dialect=Dialect(yarn_applies=value), **short), TOKENS)


def routing_weight_on(value):
    """The same value by linearity; in float32 the bits differ, in FP8 the quantised tensor would."""
    return logits(small(dtype=np.float32, dialect=Dialect(routing_weight_on=value)), TOKENS)


def seq_aux_counts(value):
    model = small(dialect=Dialect(seq_aux_counts=value))
    _, parts = model.loss(model.inputs(TOKENS, labels=TOKENS), aux_weight=1.0)
    return parts["L1/loss.seq_aux"]


def bias_update(value):
    """A common offset: invisible to the selection, visible in the bias."""
    load = np.array([5, 1, 1, 1])
    return router.bias_update(np.zeros(4), load, gamma=1e-3, zero_sum=value == "zero_sum")


EFFECTS = {
    f.__name__: f
    for f in (
        mtp_hidden,
        mtp_recycle,
        mtp_concat,
        mtp_loss_mean,
        latent_norm_eps,
        topk_denominator_eps,
        masked_group_fill,
        yarn_applies,
        routing_weight_on,
        seq_aux_counts,
        bias_update,
    )
}
VALUES = {"latent_norm_eps": [1e-6, None], "topk_denominator_eps": [1e-20, 1e-25]}


def values_of(name):
    """The default, then the alternatives."""
    hint = typing.get_type_hints(Dialect)[name]
    values = list(typing.get_args(hint)) if typing.get_origin(hint) is typing.Literal else VALUES[name]
    assert values[0] == getattr(Dialect(), name)
    return values


def test_every_option_has_its_effect_here():
    """Catches an option that is declared and never read."""
    assert {f.name for f in dataclasses.fields(Dialect)} == set(EFFECTS)


@pytest.mark.parametrize("name", sorted(EFFECTS))
def test_option_changes_something(name):
    """Catches an option that is read and changes nothing."""
    default, *others = (np.asarray(EFFECTS[name](v)) for v in values_of(name))
    for other in others:
        assert default.shape == other.shape and (default != other).any()


@pytest.mark.parametrize("name", sorted(EFFECTS))
def test_option_travels_in_the_config_file(name):
    """Catches a dialect lost between to_dict and from_dict."""
    for value in values_of(name):
        c = SMALL.replace(dialect=Dialect(**{name: value}))
        assert Config.from_dict(c.to_dict()) == c
        assert ("dialect" in c.to_dict()) == (value != getattr(Dialect(), name))
