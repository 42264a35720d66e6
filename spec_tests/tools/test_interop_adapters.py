"""Every adapter passes the same three tests: the unchanged framework is told what it deserves, on preset tiny and in the regimes;
three faults are placed and named; recording twice gives the same file. Regimes of transformers: test_interop_regimes.py.
"""

import dataclasses
import math
import re
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

from refimpl.cli import main
from refimpl.diff import Case, render
from refimpl.diff.judge import judge
from refimpl.record import gguf_weights, hf, hf_load, llamacpp, mlx, torch_map
from refimpl.record.regimes import REGIMES
from refimpl.record.tapmap import read
from refimpl.record.torch_arrays import one_thread

from .test_refimpl_tap import TINY
from .test_regimes import made

FAULTS = {
    "A04": ({"mla.scores"}, {"mla.probs"}, {"mla.ctx"}),
    "A06": ({"mla.q_rope", "mla.k_rope"},),
    "R09": ({"router.weights"},),
    "R18": ({"router.choice"}, {"router.ids"}),
}
"""No mscale in the softmax scale, mscale in cos and sin, the routed scaling factor twice, the selection bias 0 -> the stages that
change, and where that shows if they are not recorded.
"""
LATENT = ("A06", "R09", "R18")
"""Where attention is on the latents, whose scores do not show the width that A04 is about."""
EPS = {"attn_norm", "ffn_norm", "final_norm", "mla.q_a_norm", "mla.c_kv"}


def plain_scale(c):
    return (c.qk_nope_head_dim + c.qk_rope_head_dim) ** -0.5


# ---- The adapters: a trace of the case, with one of the faults or none


def _transformers(case, fault):
    with one_thread():
        model = hf_load.load_model(case.raw_config, case.weights())
        attention, moe = model.model.layers[1].self_attn, model.model.layers[2].mlp
        if fault == "A04":
            attention.scaling = plain_scale(case.config)
        elif fault == "R09":
            moe.gate.routed_scaling_factor **= 2
        elif fault == "R18":
            moe.gate.e_score_correction_bias.zero_()
        return hf.trace_of(model, case)


def _mlx(case, fault):
    with mlx.on_cpu():
        model = mlx.load(case)
        attention, gate = model.model.layers[1].self_attn, model.model.layers[2].mlp.gate
        if fault == "A04":
            attention.scale = plain_scale(case.config)
        elif fault == "R09":
            gate.routed_scaling_factor **= 2
        elif fault == "R18":
            gate.e_score_correction_bias = 0 * gate.e_score_correction_bias
        return mlx.trace_of(model, case)


def _torchtitan(case, fault):
    with torch_map.built(case, read("torchtitan").build) as made:
        if fault:
            for module in made.module.modules():
                if hasattr(module, "eps"):  # what it does anyway is put right, so that the fault is seen alone
                    module.eps = case.config.rms_norm_eps
        layers = made.module.layers
        if fault == "A04":
            layers["1"].attention.softmax_scale = plain_scale(case.config)
        elif fault == "R09":
            layers["2"].moe.router.route_scale **= 2
        elif fault == "R18":
            layers["2"].moe.expert_bias_E.zero_()
        return torch_map.trace_of(made, case, read("torchtitan"))


def _megatron(case, fault):
    with torch_map.built(case, read("megatron").build) as made:
        layers = made.module.decoder.layers
        if fault == "A04":
            layers[1].self_attention.core_attention.scale = plain_scale(case.config)
        elif fault == "R09":
            layers[2].mlp.router.config.moe_router_topk_scaling_factor **= 2  # one config for all layers
        elif fault == "R18":
            layers[2].mlp.router.expert_bias.zero_()
        return torch_map.trace_of(made, case, read("megatron"))


def _llamacpp(case, fault):
    """Its faults are the conversion's."""
    import gguf

    def unbiased(weights, c):
        return {n: 0 * w if n == "blk.2.exp_probs_b.bias" else w for n, w in convert(weights, c).items()}

    convert, scale = gguf_weights.converted, gguf.GGUFWriter.add_expert_weights_scale
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        if fault == "A06":
            patch.setattr(gguf.GGUFWriter, "add_rope_scaling_yarn_log_mul", lambda self, x: None)
        elif fault == "R09":
            patch.setattr(gguf.GGUFWriter, "add_expert_weights_scale", lambda self, x: scale(self, x * x))
        elif fault == "R18":
            patch.setattr(gguf_weights, "converted", unbiased)
        path = Path(folder) / "case.gguf"
        gguf_weights.write(case, path)
        with llamacpp.loaded(path) as model:
            return llamacpp.trace_of(model, case, gguf_weights.read(path, case.config))


STAND_IN = "refimpl.spec_tests.cases.deepseek_inference:build"
"""In the place of DeepSeek's own file; held to its recorded outputs in test_interop_deepseek.py."""


def _deepseek(case, fault):
    with torch_map.built(case, STAND_IN) as made:
        layers = made.module.layers
        if fault == "A06":
            made.module.freqs_cis.mul_(1 + 0.1 * math.log(case.config.rope_scaling.factor))
        elif fault == "R09":
            layers[2].ffn.gate.route_scale **= 2
        elif fault == "R18":
            layers[2].ffn.gate.bias.data.zero_()
        return torch_map.trace_of(made, case, read("deepseek"))


@dataclasses.dataclass(frozen=True)
class Adapter:
    """needs: what it imports; words: of `refimpl record`; taps: seen of preset tiny; own: stages that differ in any case."""

    needs: tuple[str, ...]
    words: str
    taps: int
    trace: Callable
    own: frozenset[str] = frozenset()
    faults: tuple[str, ...] = ("A04", "R09", "R18")

    def available(self):
        for name in self.needs:
            pytest.importorskip(name, reason=f"{name} comes with an extra; CI runs these tests with it")


ADAPTERS = {
    "transformers": Adapter(("torch", "transformers"), "hf", 93, _transformers),
    "mlx": Adapter(("mlx.core", "mlx_lm"), "mlx", 65, _mlx),
    "llamacpp": Adapter(("gguf", "llama_cpp"), "llamacpp", 70, _llamacpp, faults=LATENT),
    "torchtitan": Adapter(("torchtitan",), "torch --map torchtitan", 69, _torchtitan, frozenset({*EPS, "moe.routed"})),
    "deepseek": Adapter(("torch",), f"torch --map deepseek --build {STAND_IN}", 83, _deepseek, faults=LATENT),
    "megatron": Adapter(("megatron.core",), "torch --map megatron", 73, _megatron),
}


def judged(name, case, fault=None):
    ADAPTERS[name].available()
    trace = ADAPTERS[name].trace(case, fault)
    return trace, judge(case, trace)


def stages(taps):
    return {tap.rpartition("/")[2] for tap in taps}


# ---- The three tests


@pytest.mark.parametrize("name", ADAPTERS)
def test_unchanged_it_is_told_what_it_deserves(name):
    """Catches a tap named for another place, a node or a call taken for another of its name, a conversion that is ours and not the
    framework's, a builder that repairs or breaks something, weights that are said to be others, a probe that changes the run.
    """
    trace, found = judged(name, Case.read(TINY))
    assert len(trace.taps) == ADAPTERS[name].taps and set(trace.header.expected) == set(trace.taps)
    assert trace.header.self_check == {"logits_taps_off_vs_on": 0.0, "repeat": 0.0}
    assert stages(f.tap for f in found.culprits) == ADAPTERS[name].own, render(found)
    assert {g.state for g in found.gates} <= {"ok"} | ({"FAIL"} if ADAPTERS[name].own else set()), render(found)
    assert all(g.state == "ok" for g in found.gates if g.name == "weights"), render(found)
    assert found.verdict == ("DIVERGES" if ADAPTERS[name].own else "CONFORMS")


@pytest.mark.parametrize(("name", "fault"), [(n, f) for n, a in ADAPTERS.items() for f in a.faults])
def test_faults_are_placed_and_named(name, fault):
    """Catches taps too few or too far apart to place a fault, one hidden by what the framework does anyway, a missed name."""
    trace, found = judged(name, Case.read(TINY), fault)
    seen = stages(trace.taps)
    blamed = {f.tap for f in found.culprits if f.stage != "moe.routed"}
    assert stages(blamed) == next(s for s in FAULTS[fault] if s <= seen), render(found)
    assert [d.id for d in found.causes if set(d.taps) & blamed] == [fault], render(found)


@pytest.mark.parametrize("name", ADAPTERS)
def test_recording_twice_gives_the_same_file(name, tmp_path, capfd):
    """Catches a date, an address, a temporary path or an unordered set in the header, arithmetic that depends on threads, and a
    framework's own words between the lines of the command.
    """
    ADAPTERS[name].available()
    for out in ("a", "b"):
        assert main(["record", *ADAPTERS[name].words.split(), str(TINY), "-o", str(tmp_path / out)]) == 0
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    said = capfd.readouterr()
    assert said.out.splitlines() == [str(tmp_path / "a"), str(tmp_path / "b")]
    assert all(line.startswith("refimpl: ") for line in said.err.splitlines()), said.err


# ---- The regimes


BF16 = {"moe.routed"}
OTHERWISE = {
    ("mlx", "no-groups"): "raises TypeError.*deepseek_v3.py:",
    ("mlx", "mtp-2"): "INCONCLUSIVE",
    ("mlx", "bias-negative"): {"router.ids"},  # experts of dropped groups count as 0
    ("mlx", "extreme-logits"): {"router.weights"},  # 0 / 0
    ("mlx", "padding"): "padding",
    ("mlx", "offset"): "positions of its own",
    ("mlx", "long-positions"): "positions of its own",
    ("llamacpp", "mscale"): {"mla.q_rope", "mla.k_rope"},
    ("llamacpp", "mtp-2"): set(),  # MTP's weights are not in the file
    ("llamacpp", "extreme-logits"): {"router.weights"},  # the sum is clamped to 6.1e-5
    ("llamacpp", "eps"): "CONTESTED",
    ("llamacpp", "padding"): "padding",
    ("llamacpp", "long-positions"): "cannot run these tokens",
    ("torchtitan", "full-rank-q"): {*EPS, *BF16} - {"mla.q_a_norm"},
    ("torchtitan", "mscale"): "one mscale",
    ("torchtitan", "mtp-2"): "MTP",
    ("torchtitan", "ragged-128"): "raises RuntimeError.*rope.py:",
    ("torchtitan", "eps"): BF16,  # the case's eps is 1e-5 as well
    ("torchtitan", "padding"): "padding",
    ("torchtitan", "offset"): "positions of its own",
    ("torchtitan", "long-positions"): "positions of its own",
    ("deepseek", "raw-weights"): "cannot hold norm_topk_prob=False",
    ("deepseek", "mscale"): "cannot hold rope_scaling",
    ("deepseek", "mtp-2"): "eh_proj.weight' has no name in DeepSeek's converted format",
    ("deepseek", "extreme-logits"): {"router.weights"},  # 0 / 0
    ("deepseek", "eps"): "cannot hold rms_norm_eps",
    ("deepseek", "padding"): "padding",
    ("deepseek", "offset"): "positions of its own",
    ("deepseek", "long-positions"): "positions of its own",
    ("megatron", "raw-weights"): "norm_topk_prob is False",
    ("megatron", "full-rank-q"): "q_lora_rank is null",
    ("megatron", "mtp-2"): "num_nextn_predict_layers",
    ("megatron", "eps"): "CONTESTED",
    ("megatron", "padding"): "padding",
    ("megatron", "offset"): "positions of its own",
    ("megatron", "long-positions"): "positions of its own",
}
"""(adapter, regime) -> stages that are blamed, another verdict than CONFORMS, or the words with which it is not run."""
VERDICTS = ("INCONCLUSIVE", "CONTESTED")


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in ADAPTERS if n != "transformers"])
@pytest.mark.parametrize("regime", REGIMES)
def test_in_a_regime_it_is_told_what_it_deserves(name, regime, tmp_path, capfd):
    """Catches a regime that blames a right implementation, an adapter that passes over a setting its framework has no words for,
    and a framework's exception that is called a bug of ours.
    """
    ADAPTERS[name].available()
    expected = OTHERWISE.get((name, regime), ADAPTERS[name].own)
    if isinstance(expected, str) and expected not in VERDICTS:
        words = [*ADAPTERS[name].words.split(), str(made(regime).path), "-o", str(tmp_path / "t")]
        assert main(["record", *words]) == 3 and re.search(expected, capfd.readouterr().err)
        return
    _, found = judged(name, made(regime))
    if isinstance(expected, str):
        assert found.verdict == expected, render(found)
    else:
        assert stages(f.tap for f in found.culprits) == expected, render(found)
        assert found.verdict == ("DIVERGES" if expected or regime == "mtp-2" else "CONFORMS"), render(found)
