"""Runs of the implementation that must agree with each other, whatever it is: no reference is needed."""

import numpy as np
import pytest

from refimpl.checkpoint import safetensors
from refimpl.conformance.bench import PLAIN, permuted

from .plugin import claim

AFTER = ("FW-002",)


def halves(bench, case, at):
    """Logits of a prefill of tokens up to `at`, then of the rest on the same cache."""
    tokens, cache = np.asarray(case.tokens), {}
    first = bench.of.logits(tokens[:, :at], cache=cache)
    return np.concatenate([first, bench.of.logits(tokens[:, at:], cache=cache)], axis=1)


@claim("RN-001", "cache", "R 2.1.1")
def test_a_prefill_in_two_chunks_is_the_whole(bench):
    """Catches a cache that holds what was rotated twice, positions that start again, a mask of the chunk alone."""
    case = bench.loaded()
    tokens = np.asarray(case.tokens)
    whole = bench.of.logits(tokens)
    for at in (1, tokens.shape[1] // 2, tokens.shape[1] - 1):
        assert not bench.near(PLAIN, halves(bench, case, at), whole)


@claim("RN-002", "cache", "R 2.1.1")
def test_token_by_token_is_the_whole(bench):
    """Catches a decode step that differs from the prefill: absorbed weights, a position off by one, a stale key."""
    case = bench.loaded()
    tokens, cache = np.asarray(case.tokens), {}
    found = [bench.of.logits(tokens[:, :1], cache=cache)]
    for at in range(1, tokens.shape[1]):
        found.append(np.asarray(bench.of.call("step", tokens[:, at], cache)["logits"], np.float64))
    assert not bench.near(PLAIN, np.concatenate(found, axis=1), bench.of.logits(tokens))


@claim("RN-003", "core", "R 2.1.2")
def test_a_batch_is_its_sequences(bench):
    """Catches experts, capacities or masks that one sequence of a batch shares with another."""
    case = bench.loaded()
    whole = bench.of.logits(case.tokens)
    alone = np.concatenate([bench.of.logits([row]) for row in case.tokens])
    assert not bench.near(PLAIN, alone, whole)


@claim("RN-004", "core", "R 2.1.1")
def test_no_token_sees_a_later_one(bench):
    """Catches a missing or shifted causal mask, and experts that are chosen across tokens."""
    case = bench.loaded()
    tokens = np.asarray(case.tokens)
    before, at = bench.of.logits(tokens), tokens.shape[1] // 2
    other = tokens.copy()
    other[:, at:] = (other[:, at:] + 1) % case.config.vocab_size
    after = bench.of.logits(other)
    assert not bench.near(PLAIN, after[:, :at], before[:, :at])
    assert bench.near(PLAIN, after[:, at:], before[:, at:])


@claim("RN-005", "core", "R 2.1.1")
def test_padding_in_front_changes_nothing(bench):
    """Catches padding that is attended to, or that moves positions."""
    case = bench.loaded()
    row, pad = np.asarray(case.tokens[:1]), 5
    padded = np.concatenate([np.zeros((1, pad), row.dtype), row], axis=1)
    valid = np.concatenate([np.zeros((1, pad), np.int64), np.ones_like(row)], axis=1)
    positions = np.maximum(np.cumsum(valid, axis=1) - 1, 0)
    with_padding = bench.of.logits(padded, valid=valid, positions=positions)[:, pad:]
    assert not bench.near(PLAIN, with_padding, bench.of.logits(row))


@claim("RN-006", "core", "R 2.1.1")
def test_only_differences_of_positions_count(bench):
    """Catches rotations that are not rotations: of queries and keys by different angles, or of the wrong channels."""
    case = bench.loaded()
    tokens = np.asarray(case.tokens)
    at = np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape)
    assert not bench.near(PLAIN, bench.of.logits(tokens, positions=at + 11), bench.of.logits(tokens, positions=at))


def orders(config):
    """Experts in another order within their groups, and whole groups in another order."""
    size = config.n_routed_experts // config.n_group
    inside = [g * size + (e + 1) % size for g in range(config.n_group) for e in range(size)]
    groups = [((g + 1) % config.n_group) * size + e for g in range(config.n_group) for e in range(size)]
    return {"experts": inside, "groups": groups}


@pytest.mark.parametrize("which", ["experts", "groups"])
@claim("RN-007-{which}", "core", "R 2.1.2 eqs 12-16", after=AFTER)
def test_the_order_of_experts_means_nothing(bench, which):
    """Catches a choice that looks at places instead of scores, and groups that are not the first E / n_group experts."""
    case = bench.loaded()
    before = bench.of.logits(case.tokens)
    after = bench.changed(case, permuted(case, orders(case.config)[which]))
    assert not bench.near(PLAIN, after, before)


@pytest.mark.parametrize("by", [-3.0, 5.0])
@claim("RN-008", "core", "R 2.1.2 eq 16", after=AFTER)
def test_a_bias_that_all_experts_share_means_nothing(bench, by):
    """Catches a bias that leaks into the weights (R01), and masked groups filled with 0 (R02)."""
    case = bench.loaded()
    before = bench.of.logits(case.tokens)
    moved = {
        n: np.asarray(w) + np.float32(by) if n.endswith("e_score_correction_bias") else w
        for n, w in case.weights().items()
    }
    assert not bench.near(PLAIN, bench.changed(case, moved), before)


@claim("RN-009", "core", "R 2.1.1", after=AFTER)
def test_the_order_of_heads_means_nothing(bench):
    """Catches a q, k/v or output projection that is cut into heads another way than the others."""
    case = bench.loaded()
    before, c = bench.of.logits(case.tokens), case.config
    turned = dict(case.weights())
    for name, w in turned.items():
        if name.endswith(("q_b_proj.weight", "kv_b_proj.weight", "q_proj.weight")):
            turned[name] = np.roll(np.asarray(w).reshape(c.num_attention_heads, -1, w.shape[1]), 1, axis=0).reshape(
                w.shape
            )
        elif name.endswith("o_proj.weight"):
            turned[name] = np.roll(np.asarray(w).reshape(len(w), c.num_attention_heads, -1), 1, axis=1).reshape(w.shape)
    assert not bench.near(PLAIN, bench.changed(case, turned), before)


@pytest.mark.slow
@claim("RN-010", "fp8", "R 3.3.2")
def test_codes_with_scales_are_the_weights_they_stand_for(bench):
    """Catches a scale that is multiplied by its inverse, blocks transposed, and blocks cut off at an edge (F01-F05, F10)."""
    case = bench.case("ragged-128,fp8-weights")
    file = safetensors.open_file(case.path / "weights.safetensors")
    coded = bench.changed(case, {n: np.asarray(file[n]) for n in file})
    bench.of.load(case)
    assert not bench.near("ragged-128,fp8-weights", coded, bench.of.logits(case.tokens))
