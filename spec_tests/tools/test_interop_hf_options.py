"""Everything that `refimpl record hf` can vary: kernels, dtypes, parts of a run, gradients, DeepSeek-V2, classes of the user's own.

Each on the unchanged model, twice, and with mistakes in it.
"""

import dataclasses
import json
import pathlib

import numpy as np
import pytest

import refimpl
from refimpl.autograd.errors import SpecError
from refimpl.cli.dispatch import main
from refimpl.diff import Case, Trace, render
from refimpl.diff.judge import judge
from refimpl.layers import PRESETS
from refimpl.record import hf, hf_load, new_case
from refimpl.record.hf_bugs import BUGS, injected, with_forward, with_setting
from refimpl.record.torch_arrays import one_thread

TINY = pathlib.Path(refimpl.__file__).parent / "cases" / "tiny"
V2 = {"scoring_func": "softmax", "norm_topk_prob": False, "routed_scaling_factor": 4.0, "model_type": "deepseek_v2"}
PARTS = ("fwd", "dec16", "dec22", "dec23")
OPTIONS = {  # options -> how many taps are recorded of preset tiny
    "sdpa-batched": ({"attention": "sdpa", "experts": "batched_mm"}, 86),
    "sdpa-batched-bfloat16": ({"attention": "sdpa", "experts": "batched_mm", "dtype": "bfloat16"}, 86),
    "grouped": ({"experts": "grouped_mm"}, 93),
    "float16": ({"dtype": "float16"}, 93),
    "grouped-float16": ({"experts": "grouped_mm", "attention": "sdpa", "dtype": "float16"}, 86),
    "parts": ({"phases": PARTS}, 390),
    "parts-sdpa-bfloat16": ({"phases": PARTS, "attention": "sdpa", "dtype": "bfloat16"}, 363),
    "gradients": ({"gradients": True}, 315),
    "gradients-sdpa-batched": ({"gradients": True, "attention": "sdpa", "experts": "batched_mm"}, 302),
    "gradients-grouped-bfloat16": ({"gradients": True, "experts": "grouped_mm", "dtype": "bfloat16"}, 315),
}


@pytest.fixture(scope="module", autouse=True)
def _libraries():
    for name in ("torch", "transformers"):
        pytest.importorskip(name, reason="comes with the extra 'interop'; CI runs these tests with it")


@pytest.fixture(scope="module")
def v2(tmp_path_factory):
    """Cases of V2: with groups; and greedy with full-rank queries, as V2-Lite is."""
    folder, raw = tmp_path_factory.mktemp("v2"), json.loads((TINY / "config.json").read_text())
    found = {}
    for name, more in (
        ("v2", {"topk_method": "group_limited_greedy"}),
        ("lite", {"topk_method": "greedy", "q_lora_rank": None}),
    ):
        (folder / f"{name}.json").write_text(json.dumps(raw | V2 | more))
        assert main(["case", str(folder / name), "--config", str(folder / f"{name}.json"), "--seed", "1"]) == 0
        found[name] = folder / name
    return found


def verdict(case, path):
    """The judgement of a recorded file."""
    return judge(Case.read(case), Trace.read(path))


@pytest.mark.parametrize("name", OPTIONS)
def test_the_unchanged_model_conforms_and_recording_twice_gives_the_same_file(name, tmp_path):
    """Catches an option that is not passed on, a tap that a kernel hides and nobody notes, rows of experts in another order, a
    wrong axis of a cached tap, a gradient of a view taken for that of the whole, and hooks that move a number.
    """
    options, count = OPTIONS[name]
    paths = [hf.record(TINY, tmp_path / f"{i}.safetensors", **options) for i in range(2)]
    assert paths[0].read_bytes() == paths[1].read_bytes()
    trace = Trace.read(paths[0])
    assert len(trace.taps) == count and set(trace.taps) == set(trace.header.expected)
    assert set(trace.header.self_check.values()) == {0.0}
    found = verdict(TINY, paths[0])
    assert found.verdict == "CONFORMS", render(found)


@pytest.mark.slow
def test_flex_attention_conforms(tmp_path):
    """Catches torch's function mode compiled into the kernel, and a block mask that is not a mask. Compiling takes a minute."""
    path = hf.record(TINY, tmp_path / "t.safetensors", attention="flex_attention")
    assert {"fwd/mask", "fwd/L0/mla.q_rope", "fwd/L0/mla.k_rope"} <= set(Trace.read(path).taps)
    assert verdict(TINY, path).verdict == "CONFORMS"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["v2", "lite"])
def test_v2_conforms(name, dtype, v2, tmp_path):
    """Catches a softmax router watched as a sigmoid one, and channels that V2 leaves interleaved declared as halves."""
    path = hf.record(v2[name], tmp_path / "t.safetensors", dtype=dtype)
    found = verdict(v2[name], path)
    assert found.verdict == "CONFORMS" and not Trace.read(path).header.notes.count("not seen"), render(found)


# ---- Mistakes


def _detached(gate, forward):
    def route(x):
        logits, weights, ids = forward(x)
        return logits, weights.detach(), ids

    return route


def _doubled(o_proj, forward):
    def run(x):
        y = forward(x)
        if y.requires_grad:
            y.register_hook(lambda g: g * 2)
        return y

    return run


def _restarted(rotary, forward):
    return lambda x, position_ids: forward(x, position_ids - position_ids[:, :1])


def _rolled(module, forward):
    return lambda x: forward(x.roll(1, -2))


def _unscaled(gate, forward):
    def route(x):
        logits, weights, ids = forward(x)
        return logits, weights / gate.routed_scaling_factor, ids

    return route


FAULTS = {  # options, where, what, stages of which the diff must blame some and no others
    "sdpa: scale": ({"attention": "sdpa"}, "A04", {"mla.ctx"}),
    "sdpa: latent norm": ({"attention": "sdpa", "experts": "batched_mm"}, "A13", {"mla.q_a_norm"}),
    "sdpa: bias in weights": ({"attention": "sdpa", "experts": "batched_mm"}, "R01", {"router.weights"}),
    "batched: scaled twice": ({"experts": "batched_mm"}, "R09", {"moe.routed"}),
    "grouped: scaled twice": ({"experts": "grouped_mm"}, "R09", {"moe.routed"}),
    "grouped: shared absent": ({"experts": "grouped_mm", "dtype": "float16"}, "R17", {"moe.shared"}),
    "float16: bias lost": ({"dtype": "float16"}, "R18", {"router.choice"}),
    "parts: positions": ({"phases": PARTS}, ("rotary_emb", _restarted), {"mla.rope_tables"}),
    "parts: old keys moved": ({"phases": PARTS}, ("kv_b_proj", _rolled), {"mla.kv_b"}),
    "parts: latent norm": ({"phases": PARTS}, "A13", {"mla.q_a_norm"}),
    "gradients: router": ({"gradients": True}, ("mlp.gate", _detached), {"bwd/router.weights"}),
    "gradients: doubled": ({"gradients": True}, ("o_proj", _doubled), {"bwd/attn_out"}),
    "gradients: shared": (
        {"gradients": True},
        ("mlp.shared_experts", lambda m, forward: lambda x: forward(x.detach())),
        {"bwd/ffn_norm"},
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_mistake_is_placed(name, tmp_path):
    """Catches an option under which the recorder hides where a mistake is, or blames what follows from it."""
    options, fault, stages = FAULTS[name]
    options, case = dict(options), Case.read(TINY)
    load = {n: options.pop(n) for n in ("attention", "experts") if n in options}
    with one_thread():
        net = hf_load.load_model(case.raw_config, case.weights(), options.get("dtype", "float32"), **load)
        with injected(net, fault) if fault in BUGS else with_forward(net, *fault):
            trace = hf.trace_of(net, case, **options)
    found = judge(case, trace)
    assert {f.stage for f in found.culprits} == stages, render(found)


V2_FAULTS = {
    "weights not scaled": (lambda m: with_forward(m, "mlp.gate", _unscaled), {"router.weights"}),
    "latent not normalised": (lambda m: injected(m, "A13"), {"mla.q_a_norm"}),
    "groups ignored": (lambda m: with_setting(m, "mlp.gate", "topk_method", lambda gate: "greedy"), {"router.ids"}),
}


@pytest.mark.parametrize("name", V2_FAULTS)
def test_a_mistake_in_v2_is_placed(name, v2):
    """Catches V2's router judged by V3's rules."""
    case, (fault, stages) = Case.read(v2["v2"]), V2_FAULTS[name]
    with one_thread():
        net = hf_load.load_model(case.raw_config, case.weights())
        with fault(net):
            found = judge(case, hf.trace_of(net, case))
    assert {f.stage for f in found.culprits} == stages, render(found)


def test_a_cache_that_loses_what_it_holds_is_placed(tmp_path):
    """Catches new keys taken for those that the cache gives back."""
    import transformers

    real = transformers.DynamicCache.update

    def losing(self, *args, **kwargs):
        old, rope = real(self, *args, **kwargs)
        new = args[0].shape[-2]
        return old.index_fill(-2, old.new_tensor(range(old.shape[-2] - new)).long(), 0), rope

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transformers.DynamicCache, "update", losing)
        path = hf.record(TINY, tmp_path / "t.safetensors", phases=("fwd", "dec20"))
    assert {f.stage for f in verdict(TINY, path).culprits} == {"cache.c_kv"}


# ---- A class of the user's own

OWN = """
import torch
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MLP


class Experts(torch.nn.ModuleList):
    def forward(self, x, ids, weights):
        out = torch.zeros_like(x)
        for e, expert in enumerate(self):
            token, slot = (ids == e).nonzero(as_tuple=True)
            out.index_add_(0, token, expert(x[token]) * weights[token, slot, None])
        return out * FACTOR


class MineForCausalLM(DeepseekV3ForCausalLM):
    config_class = DeepseekV3Config

    def __init__(self, config):
        super().__init__(config)
        for layer in self.model.layers[config.first_k_dense_replace :]:
            sizes = {"intermediate_size": config.moe_intermediate_size}
            layer.mlp.experts = Experts([DeepseekV3MLP(config, **sizes) for _ in range(config.n_routed_experts)])
"""


def test_a_modelling_file_of_the_users_own_is_judged(tmp_path, capsys):
    """Catches experts one by one that keep random weights because the loader fuses them; a right file refused, a wrong passed."""
    for factor, blamed in (("1", set()), ("2.5", {"moe.routed"})):
        file = tmp_path / "modeling_mine.py"
        file.write_text(OWN.replace("FACTOR", factor))
        path = hf.record(TINY, tmp_path / "t.safetensors", model=str(file))
        found = verdict(TINY, path)
        assert {f.stage for f in found.culprits} == blamed, render(found)
        assert found.verdict == ("DIVERGES" if blamed else "INCONCLUSIVE")  # what single experts compute is not seen
    assert main(["record", "hf", str(TINY), "-o", str(tmp_path / "t"), "--model", f"{file}:MineForCausalLM"]) == 0
    said = capsys.readouterr().err
    assert "10 of 93 taps were not seen: fwd/L1/moe.rows" in said and f"model {file}:MineForCausalLM" in said


def test_a_class_of_a_package_is_found(tmp_path):
    """Catches a dotted name taken for a path."""
    path = hf.record(TINY, tmp_path / "t.safetensors", model="transformers:DeepseekV3ForCausalLM", taps="logits")
    assert set(Trace.read(path).taps) == {"fwd/logits"}


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("nowhere.py", "there is no file"),
        ("broken.py:X", "cannot be imported: ZeroDivisionError"),
        ("empty.py", "no class ...ForCausalLM"),
        ("transformers:Nothing", "no class Nothing"),
        ("torch.nn:Linear", "record torch --build"),
        ("pkg", "expected pkg.mod:Class"),
    ],
)
def test_a_class_that_is_none_is_refused(name, complaint, tmp_path, monkeypatch):
    """Catches a traceback instead of what is wrong with --model."""
    monkeypatch.chdir(tmp_path)
    pathlib.Path("broken.py").write_text("1 / 0")
    pathlib.Path("empty.py").write_text("")
    with pytest.raises(SpecError, match=complaint):
        hf.record(TINY, tmp_path / "t.safetensors", model=name)


@pytest.mark.parametrize("place", ["def __init__(self, config)", "def forward(self, **inputs)"])
def test_what_a_class_of_the_users_own_raises_is_said_of_it(place, tmp_path, capsys):
    """Catches an exception of the user's file that is called a bug of ours."""
    file = tmp_path / "modeling_bad.py"
    body = f"class BadForCausalLM(DeepseekV3ForCausalLM):\n    {place}:\n        raise KeyError('boom')\n"
    file.write_text(f"from transformers import DeepseekV3ForCausalLM\n\n\n{body}")
    assert main(["record", "hf", str(TINY), "-o", str(tmp_path / "t"), "--model", str(file)]) == 3
    assert "raises KeyError: 'boom'" in (said := capsys.readouterr().err) and "modeling_bad.py:6)" in said


def test_a_trace_that_cannot_be_written_is_refused(tmp_path, capsys):
    """Catches a traceback, called a bug of ours, for a folder that is not there."""
    assert main(["record", "hf", str(TINY), "-o", str(tmp_path / "a" / "b" / "t")]) == 3
    assert "cannot be written: No such file or directory" in capsys.readouterr().err


# ---- What is said


def test_another_version_is_warned_of_and_recorded(tmp_path, monkeypatch, capsys):
    """Catches a version nobody tried that is passed over in silence, and one that is refused."""
    import transformers

    monkeypatch.setattr(transformers, "__version__", "5.99.0")
    assert main(["record", "hf", str(TINY), "-o", str(tmp_path / "t")]) == 0
    warning = "warning: transformers 5.99.0: the map transformers was tested with 5.23, 5.24"
    assert warning in capsys.readouterr().err and warning in Trace.read(tmp_path / "t").header.notes


def test_gradients_of_a_padded_case_leave_out_what_padding_predicts(tmp_path):
    """Catches a loss that counts padding, or a token that only padding sees."""
    new_case(tmp_path / "case", PRESETS["tiny"], regimes="padding", seed=1)
    path = hf.record(tmp_path / "case", tmp_path / "t.safetensors", attention="sdpa", gradients=True)
    trace, case = Trace.read(path), Case.read(tmp_path / "case")
    for row, real, tokens in zip(trace.header.training["labels"], case.valid, case.tokens, strict=True):
        seen = [
            t if one and (s == 0 or real[s - 1]) else -100 for s, (t, one) in enumerate(zip(tokens, real, strict=True))
        ]
        assert row == seen
    assert judge(case, trace).verdict == "CONFORMS"


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"attention": "flash"}, "attention 'flash'; known: eager, sdpa"),
        ({"experts": "sonic"}, "experts 'sonic'; known: eager, batched_mm"),
        ({"phases": ("dec3",)}, "the first part is fwd"),
        ({"phases": ("fwd", "dec99")}, "begins after the 24 tokens"),
        ({"phases": ("fwd", "bwd")}, "fwd and decN"),
        ({"phases": ("fwd", "dec3"), "gradients": True}, "has one part"),
    ],
)
def test_what_cannot_be_run_is_refused(options, complaint, tmp_path):
    """Catches an option that is passed over."""
    with pytest.raises(SpecError, match=complaint):
        hf.record(TINY, tmp_path / "t.safetensors", **options)


def test_a_missing_gradient_is_not_a_missing_tap(tmp_path):
    """Catches a gradient that the model does not form left out, so that no stage can be blamed for it."""
    case = Case.read(TINY)
    with one_thread():
        net = hf_load.load_model(case.raw_config, case.weights())
        with with_forward(net, "mlp.gate", _detached):
            trace = hf.trace_of(net, dataclasses.replace(case), gradients=True)
    assert not np.any(trace.taps["bwd/L1/router.weights"]) and not np.any(
        trace.taps["grad/model.layers.1.mlp.gate.weight"]
    )
