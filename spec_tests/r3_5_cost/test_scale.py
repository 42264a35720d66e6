"""The scale model against what DeepSeek has published, and the planner against counts made another way."""

import argparse
import itertools
import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refimpl.autograd.errors import SpecError
from refimpl.checkpoint import count_parameters
from refimpl.cli import cluster as cluster_command
from refimpl.layers import PRESETS
from refimpl.layers.presets import DEEPSEEK_V3
from refimpl.parallel_emulation import serving
from refimpl.parallel_emulation.cost import Job, Plan, layer_cost
from refimpl.parallel_emulation.cost.cluster import Cluster, Link, traffic
from refimpl.parallel_emulation.cost.published import KV_BYTES_PER_TOKEN, LOW_LATENCY_US, NORMAL_GBS, TRAINING
from refimpl.parallel_emulation.cost.scale import (
    layer_times,
    predicted_rate,
    published_rate,
    split_layers,
    total_cost,
    total_hours,
)
from refimpl.parallel_emulation.cost.traffic import (
    LOW_LATENCY_COMBINE,
    LOW_LATENCY_DISPATCH,
    Copies,
    bf16_row,
    count_copies,
    fp8_row,
    low_latency_row,
    low_latency_time,
    normal_bandwidth,
    normal_time,
    uniform_choices,
    uniform_copies,
)
from refimpl.parallel_emulation.pipeline import build, simulate

# ---- Identities of the published numbers


def test_the_published_numbers_are_one_another():
    """Each from the 19.926 s step. Catches a unit slip: tokens, days, hours, GPUs."""
    rate = published_rate()
    assert rate.tokens == 62_914_560
    assert rate.tokens_per_day == pytest.approx(272.80e9, rel=1e-4)
    assert rate.gpu_hours_per_trillion == pytest.approx(180.18e3, rel=1e-4)
    assert rate.tflops == pytest.approx(385, rel=2e-3)
    assert rate.utilisation == pytest.approx(0.3894, rel=2e-3)
    assert TRAINING.gpu_hours_per_trillion * TRAINING.trillions == TRAINING.pretraining_hours


def test_the_cost_of_the_training():
    """R table 1: 2.788 M GPU-hours, $5.576 M."""
    assert total_hours() == 2_788_000
    assert total_cost() == 5_576_000


def test_flop_per_token_is_the_published_figure():
    """250 GFLOP at 4096 tokens. Catches a full instead of a causal mask (+31) and a forgotten head (-6)."""
    assert layer_cost.training_flop(DEEPSEEK_V3, 4096) == pytest.approx(TRAINING.flops_per_token, rel=0.01)


UNEVEN = PRESETS["tiny"].replace(  # sums of its sizes have carries, unlike 512 + 64
    hidden_size=46,
    num_attention_heads=3,
    q_lora_rank=23,
    kv_lora_rank=37,
    qk_nope_head_dim=11,
    qk_rope_head_dim=6,
    v_head_dim=13,
    intermediate_size=79,
    moe_intermediate_size=19,
)


@pytest.mark.parametrize("name", [*PRESETS, "uneven"])
def test_parameters_are_those_of_the_checkpoint(name):
    """Counted from shapes there, from a formula here. Catches a bias, a norm or a projection left out."""
    c = {**PRESETS, "uneven": UNEVEN}[name]
    layers = range(c.num_hidden_layers)
    experts = sum(c.n_routed_experts * layer_cost.expert_parameters(c) for i in layers if c.is_moe(i))
    dense = sum(layer_cost.dense_parameters(c, i) for i in layers)
    assert dense + experts + 2 * c.vocab_size * c.hidden_size + c.hidden_size == count_parameters(c).total


# ---- Copies


def slow_copies(ids, source, experts, ep, per_node):
    """Token by token with sets."""
    totals = [0, 0, 0, 0]
    for row, home in zip(ids.tolist(), source.tolist(), strict=True):
        ranks = {e * ep // experts for e in row if e >= 0}
        nodes = {r // per_node for r in ranks}
        relays = {node * per_node + home % per_node for node in nodes}
        for i, n in enumerate((len(ranks), len(nodes), len(nodes - {home // per_node}), len(ranks - relays))):
            totals[i] += n
    return [total / len(ids) for total in totals]


@given(st.integers(0, 2**31), st.sampled_from([1, 2, 4, 8, 16]), st.sampled_from([2, 4]), st.integers(1, 4))
@settings(deadline=None)
def test_copies_are_counted_once_per_rank_and_node(seed, ep, per_node, k):
    """Catches a copy per expert instead of per rank, and a relay that sends to itself."""
    rng = np.random.default_rng(seed)
    ids = np.stack([rng.permutation(16)[:k] for _ in range(20)])
    ids[rng.random(ids.shape) < 0.1] = -1
    source = rng.integers(0, ep, 20)
    c = count_copies(ids, source, 16, ep, per_node)
    assert [c.ranks, c.nodes, c.remote_nodes, c.nvlink] == slow_copies(ids, source, 16, ep, min(per_node, ep))


def test_choices_are_the_best_of_the_best_nodes():
    """At most 4 nodes, and no token could do better within them. Catches a limit that is not one."""
    rng, again = np.random.default_rng(3), np.random.default_rng(3)
    ids, scores = uniform_choices(rng, 50, 256, 8, 8, 4), again.random((50, 256))
    for row, chosen in zip(scores, ids, strict=True):
        best = sorted(range(8), key=lambda n: -row[n * 32 : n * 32 + 32].max())[:4]
        allowed = [e for n in best for e in range(n * 32, n * 32 + 32)]
        assert sorted(chosen.tolist()) == sorted(sorted(allowed, key=lambda e: -row[e])[:8])


@pytest.mark.parametrize(
    ("ep", "ranks", "nodes", "remote"),
    [(8, 5.29, 1, 0), (16, 6.53, 1.99, 1.0), (32, 7.27, 3.61, 2.71), (64, 7.46, 3.98, 3.48), (128, 7.64, 4.0, 3.75)],
)
def test_copies_for_uniform_scores(ep, ranks, nodes, remote):
    """Computed once for the research behind this model; 0.03 is three standard errors of 8192 tokens."""
    c = uniform_copies(ep)
    assert (c.ranks, c.nodes, c.remote_nodes) == pytest.approx((ranks, nodes, remote), abs=0.03)


# ---- DeepEP's tables


@pytest.mark.parametrize("ep", NORMAL_GBS)
def test_normal_kernels_from_two_link_constants(ep):
    """44 GB/s IB, 153 GB/s NVLink, the larger time: dispatch within -2...+9 %, combine within -4...+13 %.

    Catches a model of IB alone, which is 2 x too fast at EP 16, where NVLink is the limit.
    """
    copies, cluster, (dispatch, combine) = uniform_copies(ep), Cluster(), NORMAL_GBS[ep]
    assert -0.02 <= normal_bandwidth(cluster, copies, 4096, fp8_row(7168)) / 1e9 / dispatch - 1 <= 0.09
    assert -0.04 <= normal_bandwidth(cluster, copies, 4096, bf16_row(7168)) / 1e9 / combine - 1 <= 0.131
    ib_alone = copies.remote_nodes * 4096 * bf16_row(7168) / 44e9
    assert (normal_time(cluster, copies, 4096, bf16_row(7168)) > 1.5 * ib_alone) == (ep <= 16)


@pytest.mark.parametrize("ep", [ep for ep in LOW_LATENCY_US if ep > 8])
def test_low_latency_kernels_from_a_line_each(ep):
    """Dispatch within 3 %, combine within 5.1 %. Catches local messages counted as remote."""
    dispatch, combine = LOW_LATENCY_US[ep]
    ours = low_latency_time(LOW_LATENCY_DISPATCH, ep, 128, 8, low_latency_row(7168)) * 1e6
    assert ours == pytest.approx(dispatch, rel=0.03)
    ours = low_latency_time(LOW_LATENCY_COMBINE, ep, 128, 8, bf16_row(7168)) * 1e6
    assert ours == pytest.approx(combine, rel=0.051)


def test_the_bytes_of_a_token():
    """7168 + 56 scales of 4; 7408 with metadata; 14336 in BF16."""
    assert (fp8_row(7168), low_latency_row(7168), bf16_row(7168)) == (7392, 7408, 14336)


def test_the_decode_bound_of_the_hardware_paper():
    """120.96 us per expert-parallel round trip: 32 tokens, 9 copies, 7 K hidden, 1 + 2 bytes, 50 GB/s. alpha = 0."""
    assert Link(0, 50e9).time((1 + 2) * 32 * 9 * 7000) * 1e6 == pytest.approx(120.96)


# ---- Links


@given(st.integers(1, 12), st.integers(1, 4), st.integers(0, 2**31))
@settings(deadline=None)
def test_bytes_are_sorted_by_link_class(n, per_node, seed):
    """A pair at a time. Catches rows and columns exchanged, and the diagonal counted."""
    m = np.random.default_rng(seed).integers(0, 100, (n, n))
    t = traffic(Cluster(12 * per_node, per_node), m)
    slow = np.zeros((4, n))
    for i in range(n):
        for j in range(n):
            if i != j:
                across = 2 * (i // per_node != j // per_node)
                slow[across, i] += m[i, j]
                slow[across + 1, j] += m[i, j]
    np.testing.assert_array_equal([t.nvlink_out, t.nvlink_in, t.ib_out, t.ib_in], slow)


def test_a_phase_takes_the_longer_link():
    """Catches the sum of both, or only one direction of a link."""
    cluster = Cluster(4, 2, nvlink=Link(1.0, 10.0), ib=Link(2.0, 5.0))
    inside, across = np.zeros((4, 4)), np.zeros((4, 4))
    inside[1, 0], across[2, 0], across[3, 0] = 100, 10, 10
    assert traffic(cluster, inside).time(cluster) == 1 + 100 / 10
    assert traffic(cluster, across).time(cluster) == 2 + 20 / 5
    assert traffic(cluster, inside + across).time(cluster) == 11
    assert traffic(cluster, inside * 0).time(cluster) == 0


# ---- The training step


def test_the_step_within_15_percent_of_the_published_one():
    """From one traced pair, the link model and DualPipe's order. Catches exposed communication added to a pair."""
    rate, _ = predicted_rate()
    assert rate.step == pytest.approx(TRAINING.step_s, rel=0.15)
    assert rate.gpu_hours_per_trillion == pytest.approx(TRAINING.gpu_hours_per_trillion, rel=0.15)


def test_the_calibration_returns_the_trace():
    """V3 on H800: F 64 ms, I 87, W 24, F&B 129 for four layers. Catches FLOP that do not cancel."""
    chunk = layer_times(DEEPSEEK_V3, Cluster(), uniform_copies(64)).chunk(4)
    assert pytest.approx((0.064, 0.087, 0.024), abs=5e-4) == (chunk.F, chunk.B - chunk.W, chunk.W)
    assert pytest.approx(0.129, rel=1e-12) == chunk.FB


def test_a_slow_network_becomes_the_limit_of_a_pair():
    """A tenth of the bandwidth: the pair takes as long as its communication. Catches overlap that is free."""
    slow = Cluster(ib=Link(0, 4.4e9))
    times = layer_times(DEEPSEEK_V3, slow, uniform_copies(64))
    alone = 3.475 * 4096 * (7392 + 14336) / 4.4e9
    assert times.communication == pytest.approx(alone, rel=2e-3)  # 3.475 is rounded
    assert (
        pytest.approx(min(2 * alone / 0.67 / 0.916, times.chunk(1).F + times.chunk(1).B), rel=0.01) == times.chunk(1).FB
    )


def test_dualpipes_gain_is_overlap():
    """1F1B 23.6 s and ZB1P 22.8 s on the same durations, DualPipe 17.4. Catches F&B charged as F + B."""
    chunk = layer_times(DEEPSEEK_V3, Cluster(), uniform_copies(64)).chunk(4)
    spans = {name: simulate(build(name, 16, 120), chunk).makespan for name in ("1f1b", "zb1p", "dualpipe")}
    assert spans == pytest.approx({"1f1b": 23.55, "zb1p": 22.84, "dualpipe": 17.37}, abs=0.01)


def test_twice_the_gpu_twice_the_speed():
    """Peak scales computation and nothing else. Catches peak in the communication."""
    base = layer_times(DEEPSEEK_V3, Cluster(), uniform_copies(64))
    fast = layer_times(DEEPSEEK_V3, Cluster(peak=2 * 989e12), uniform_copies(64))
    assert fast.forward == pytest.approx(base.forward / 2) and fast.communication == base.communication


# ---- The planner


def small_job(**changes):
    cluster = Cluster(changes.pop("gpus", 32), changes.pop("per_node", 4))
    config = PRESETS["tiny"].replace(num_hidden_layers=8, topk_method="greedy", n_group=1, topk_group=1)
    sizes = {"pp": 4, "ep": 4, "micro_batches": 8, "schedule": "dualpipe", "sequence": 16}
    return Job(config, cluster, **(sizes | changes))


def test_v3s_own_plan():
    """2048 GPUs without tensor parallelism: the model fits 80 GB, the step is near the published one.

    Catches parameters of one direction only (DualPipe holds 2 x), and experts not divided by EP.
    """
    plan = Plan(Job())
    assert plan.fits and plan.job.dp == 2 and plan.job.step_tokens == 62_914_560
    assert plan.rate.step == pytest.approx(TRAINING.step_s, rel=0.15)
    assert plan.optimizer_time == pytest.approx(TRAINING.optimizer_s, rel=0.5)  # one exchange of unknown overlap
    held = [sum(plan.parameters(rank)) for rank in range(16)]
    experts = sum(plan.parameters(rank)[1] for rank in range(16))
    total = count_parameters(DEEPSEEK_V3)
    assert experts == 2 * total.routed_experts / 64
    assert sum(held) - experts == 2 * (total.total - total.routed_experts)


@pytest.mark.parametrize("schedule", ["1f1b", "zb1p", "interleaved", "dualpipe", "dualpipev"])
def test_expert_bytes_are_tokens_times_layers_times_rows(schedule):
    """All GPUs together: tokens x MoE layers x (dispatch + combine) x 2 x copies. Catches a direction counted twice."""
    job = small_job(schedule=schedule, pp=2 if schedule in ("interleaved", "dualpipev") else 4, ep=8)
    plan = Plan(job)
    nvlink, ib = plan.traffic()["expert"]
    rows = job.step_tokens * 7 * 2 * (fp8_row(48) + bf16_row(48))
    assert ib.sum() == pytest.approx(rows * plan.copies.remote_nodes)
    assert nvlink.sum() == pytest.approx(rows * plan.copies.nvlink)


@pytest.mark.parametrize(("schedule", "hops"), [("1f1b", 3), ("zb1p", 3), ("dualpipe", 3), ("dualpipev", 6)])
def test_pipeline_bytes_are_hops_times_tokens(schedule, hops):
    """Two messages (activation, gradient) per micro-batch and hop. DualPipeV: 7 boundaries, one of them local.

    Catches DualPipe's two directions counted as two models' worth of messages.
    """
    job = small_job(schedule=schedule)
    nvlink, ib = Plan(job).traffic()["pipeline"]
    assert (nvlink + ib).sum() == 2 * hops * job.step_tokens * bf16_row(48)
    assert not nvlink.any(), "ranks of 8 GPUs fill nodes of 4"


def test_neighbouring_pipeline_ranks_in_one_node_use_nvlink():
    """Two GPUs a rank, four a node: ranks 0-1 and 2-3 share one, 1-2 do not. Catches one class for all."""
    nvlink, ib = Plan(small_job(gpus=8, ep=2, schedule="1f1b")).traffic()["pipeline"]
    message = 8 * 16 * bf16_row(48)
    assert nvlink.tolist() == [message] * 8
    assert ib.tolist() == [0, 0, message, message, message, message, 0, 0]


def test_data_parallel_bytes_are_those_of_two_rings():
    """(d-1)/d x (4 + 2) bytes: dense over all GPUs of a stage, experts over their copies. Catches one group for both."""
    job = small_job(schedule="1f1b")  # 4 stages x dp 2 x ep 4
    plan = Plan(job)
    nvlink, ib = plan.traffic()["data"]
    for rank in range(4):
        dense, experts = plan.parameters(rank)
        sent = (nvlink + ib)[rank * 8 : rank * 8 + 8]
        np.testing.assert_allclose(sent, 6 * (7 / 8 * dense + 1 / 2 * experts), rtol=1e-12)
        np.testing.assert_allclose(ib[rank * 8], 6 * (7 / 8 * dense * 2 / 8 + 1 / 2 * experts), rtol=1e-12)


def test_the_mirror_shares_dualpipes_gradients():
    """A stage lives on two ranks: its group is twice as large. Catches copies that would drift apart."""
    plan = Plan(small_job())
    dense, experts = plan.parameters(0)
    assert plan.parameters(3) == (dense, experts)
    nvlink, ib = plan.traffic()["data"]
    assert (nvlink + ib)[0] == pytest.approx(6 * (15 / 16 * dense + 3 / 4 * experts))
    assert plan.memory(0).optimizer == pytest.approx(8 * (dense / 16 + experts / 4))


def test_live_chunks_decide_the_activations():
    """1F1B: rank r keeps P-r chunks of its stage, GPipe all. Catches the same memory on every rank."""
    kept = [Plan(small_job(schedule="1f1b")).memory(r).activations for r in (1, 2, 3)]
    assert kept == pytest.approx([3 * kept[2], 2 * kept[2], kept[2]])
    assert Plan(small_job(schedule="gpipe")).memory(3).activations == pytest.approx(8 * kept[2])


def test_layers_are_split_evenly():
    assert split_layers(61, 16) == [4] * 13 + [3] * 3
    assert split_layers(4, 4) == [1, 1, 1, 1]


BAD_JOBS = {
    "pp=3 x ep=4 does not divide 32 GPUs": {"pp": 3},
    "DualPipe with 6 micro-batches": {"micro_batches": 6},
    "9 stages for 8 layers": {"pp": 9, "ep": 1, "gpus": 36, "schedule": "1f1b"},
    "does not divide 16 experts": {"ep": 32, "pp": 1, "gpus": 32, "schedule": "1f1b"},
    "does not fit nodes of 3 GPUs": {"ep": 2, "per_node": 3, "gpus": 24},
    "known: gpipe": {"schedule": "magic"},
    "sequence is 0": {"sequence": 0},
    "do not fill nodes": {"gpus": 30, "pp": 1, "ep": 2},
}


@pytest.mark.parametrize("complaint", BAD_JOBS)
def test_jobs_that_cannot_run_are_refused(complaint):
    """Catches a plan with fractions of ranks."""
    with pytest.raises(SpecError, match=complaint):
        Plan(small_job(**BAD_JOBS[complaint]))


@pytest.mark.parametrize(
    ("make", "complaint"),
    [
        (lambda: Link(-1, 1), "latency is -1"),
        (lambda: Link(0, 0), "bandwidth is 0"),
        (lambda: Cluster(0), "cluster of 0 GPUs"),
        (lambda: Cluster(peak=0), "peak is 0"),
        (lambda: Cluster(gpus_per_node=0), "0 GPUs per node"),
        (lambda: traffic(Cluster(), np.zeros((2, 3))), "shape"),
        (lambda: traffic(Cluster(8), np.zeros((9, 9))), "9 ranks for 8 GPUs"),
        (lambda: traffic(Cluster(8), -np.ones((2, 2))), "negative"),
        (lambda: low_latency_time(LOW_LATENCY_DISPATCH, 8, 1, 1, 1), "across nodes"),
        (lambda: count_copies(np.array([[9]]), np.array([0]), 8, 8), "expert ids"),
        (lambda: count_copies(np.array([[0]]), np.array([8]), 8, 8), "source ranks"),
        (lambda: uniform_choices(np.random.default_rng(0), 4, 16, 9, 4, 2), "top 9 of 2 nodes"),
        (lambda: Job(PRESETS["tiny"].replace(n_routed_experts=0, first_k_dense_replace=3)), "no routed experts"),
        (lambda: serving.kv_transfer_bytes(DEEPSEEK_V3, -1), "-1 tokens"),
    ],
)
def test_impossible_clusters_and_routings_are_refused(make, complaint):
    """Catches a division by zero, and an answer for a question that makes no sense."""
    with pytest.raises(SpecError, match=complaint):
        make()


# ---- Serving


def test_the_kv_transfer_of_a_token():
    """576 values x 2 bytes x 61 layers. Catches keys and values of all heads."""
    assert serving.kv_transfer_bytes(DEEPSEEK_V3, 1) == KV_BYTES_PER_TOKEN == 70_272 == 576 * 2 * 61
    assert serving.kv_transfer_bytes(DEEPSEEK_V3, 5, value_bytes=1) == 5 * 576 * 61
    cluster = Cluster(ib=Link(1.0, 70_272.0))
    assert serving.kv_transfer_time(DEEPSEEK_V3, 2, cluster) == 61 + 2


LANES = {"prefill": serving.prefill_overlap, "decode": serving.decode_overlap}


@pytest.mark.parametrize("name", LANES)
@pytest.mark.parametrize("layers", [1, 2, 5])
def test_two_micro_batches_go_through_every_stage_in_order(name, layers):
    """Each stage of each layer once for both, never before its input, one part at a time in a lane.

    Catches a dispatch of tokens whose attention is not done.
    """
    lanes = LANES[name](layers)
    spans = serving.run_lanes(lanes, dict.fromkeys(lanes.stages, 1.0))
    assert sorted(spans) == sorted(serving.Part(s, b, n) for s in lanes.stages for b in (0, 1) for n in range(layers))
    for batch in (0, 1):
        mine = sorted(span for part, span in spans.items() if part.batch == batch)
        assert all(a[1] <= b[0] for a, b in itertools.pairwise(mine))
        order = sorted((p for p in spans if p.batch == batch), key=spans.get)
        assert [p.stage for p in order] == list(lanes.stages) * layers
    for lane in (lanes.compute, lanes.network):
        times = [spans[part] for part in lane]
        assert all(a[1] <= b[0] for a, b in itertools.pairwise(times))


@pytest.mark.parametrize(
    ("name", "seconds"),
    [
        ("prefill", {"attention": 4.0, "mlp": 3.0, "dispatch": 3.0, "combine": 3.0}),
        ("decode", {"attention 1": 2.0, "attention 2": 2.0, "mlp": 1.0, "dispatch": 2.0, "combine": 2.0}),
    ],
)
def test_communication_no_longer_than_computation_is_hidden(name, seconds):
    """Whatever the depth, only the ends are exposed. Catches an order that waits in every layer."""
    few, many = (serving.exposed(LANES[name](layers), seconds) for layers in (2, 58))
    assert few == many <= seconds["dispatch"] + seconds["combine"]


def test_a_short_mlp_needs_attention_in_two_steps():
    """Decode's stages are unequal. Catches the prefill order used for decoding, which waits in every layer."""
    whole = {"attention": 4.0, "mlp": 1.0, "dispatch": 2.0, "combine": 2.0}
    halves = {"attention 1": 2.0, "attention 2": 2.0} | whole
    assert serving.exposed(serving.prefill_overlap(58), whole) > 100
    assert serving.exposed(serving.decode_overlap(58), halves) <= 4


def test_lanes_that_cannot_run_are_refused():
    """Catches an endless loop."""
    lanes = serving.prefill_overlap(1)
    turned = replace(lanes, network=tuple(reversed(lanes.network)))
    with pytest.raises(SpecError, match="wait for each other"):
        serving.run_lanes(turned, dict.fromkeys(lanes.stages, 1.0))
    with pytest.raises(SpecError, match="no duration for attention, combine"):
        serving.run_lanes(lanes, {"mlp": 1.0, "dispatch": 1.0})
    for make in LANES.values():
        with pytest.raises(SpecError, match="0 layers"):
            make(0)


# ---- Command


def command(*words):
    parser = argparse.ArgumentParser()
    cluster_command.add(parser.add_subparsers(required=True))
    args = parser.parse_args([str(word) for word in words])
    return args.run(args)


SMALL = ("--preset", "tiny", "--gpus", 6, "--gpus-per-node", 2, "--pp", 3, "--ep", 2, "--schedule", "1f1b")


def test_the_command_prints_v3s_plan(capsys):
    """Catches a plan whose defaults are not V3's run."""
    assert command("cluster") == 0
    out = capsys.readouterr().out
    assert "2048 GPUs = pp 16 x dp 2 x ep 64, dualpipe" in out
    assert "62,914,560 a step" in out and "F&B 129.0 ms" in out


def test_the_plan_as_json_and_trace(tmp_path, capsys):
    """Catches NumPy numbers that JSON cannot hold, and a trace in the wrong unit."""
    trace = tmp_path / "step.json"
    assert command("cluster", *SMALL, "--microbatches", 4, "--json", "--trace", trace) == 0
    text = capsys.readouterr().out.removeprefix(f"{trace}\n")
    plan = json.loads(text)
    assert plan["schema"] == "refimpl-plan/1" and plan["dp"] == 1 and len(plan["memory_bytes"]) == 3
    events = [e for e in json.loads(trace.read_text())["traceEvents"] if e["ph"] == "X"]
    assert max(e["ts"] + e["dur"] for e in events) / 1e6 == pytest.approx(plan["step_s"] - plan["optimizer_s"])


def test_a_job_that_does_not_fit_says_so(capsys):
    """Exit code 1. Catches a plan that looks fine and dies at the first step."""
    assert command("cluster", *SMALL, "--microbatches", 4, "--memory", 0.0001) == 1
    assert "does not fit: 0.0001 GB a GPU" in capsys.readouterr().out


def test_the_command_shows_model_and_publication(capsys):
    """Catches a table whose errors are not those of the tests above."""
    assert command("cluster", "--published") == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + 2 * len(NORMAL_GBS) + 2 * (len(LOW_LATENCY_US) - 1) + 6
    assert all(abs(float(line.split()[-1].rstrip("%"))) < 15 for line in lines[1:])


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (("--dp", 4), "--dp 4; 2048 GPUs"),
        (("--preset", "gpt"), "known: deepseek-v3"),
        (("--ib", 0), "bandwidth is 0"),
        (("--pp", 5), "does not divide 2048 GPUs"),
    ],
)
def test_impossible_plans_are_refused(words, complaint):
    """Catches sizes quietly corrected."""
    with pytest.raises(SpecError, match=complaint):
        command("cluster", *words)


def test_the_reported_bandwidth_of_one_node_counts_ranks():
    """One node: no IB at all. Catches 0 / 0, and one copy per node where five ranks need the token."""
    one = Copies(ranks=5.0, nodes=1.0, remote_nodes=0.0, nvlink=4.0)
    assert normal_bandwidth(Cluster(nvlink=Link(0, 2.0)), one, 10, 10) == pytest.approx(2.0)
