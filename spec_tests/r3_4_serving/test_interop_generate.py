"""Token for token what transformers generates: greedy, sampled with the same random numbers, by beams; and the same prompts of the
same texts.
"""

import json

import numpy as np
import pytest

from refimpl import Impl, SpecError
from refimpl.checkpoint import save
from refimpl.cli import main
from refimpl.infer import Request, Settings, Tokenizer, beam_search, by_inverse, by_race, generate, greedy
from refimpl.record import hf_load
from refimpl.record.torch_arrays import one_thread
from refimpl.spec_tests import golden
from refimpl.spec_tests.cases.configs import SMALL
from refimpl.spec_tests.strategies.models import make_weights

PROMPTS = golden.arrays("hf_tiny")["input_ids"][:, :7].tolist()
SAMPLERS = [
    {},
    {"temperature": 0.6},
    {"temperature": 1.7, "top_k": 9},
    {"temperature": 1.2, "top_p": 0.8},
    {"min_p": 0.15, "repetition_penalty": 1.6},
    {"temperature": 0.9, "top_k": 30, "top_p": 0.9, "min_p": 0.02, "repetition_penalty": 0.8},
]


@pytest.fixture(scope="module", autouse=True)
def _libraries():
    for name in ("torch", "transformers", "tokenizers", "jinja2"):
        pytest.importorskip(name, reason="comes with the extras 'interop' and 'text'; CI runs these tests with them")


@pytest.fixture(scope="module")
def both():
    config, weights, _ = golden.case("hf_tiny")
    with one_thread():
        yield Impl().load(config, weights), hf_load.load_model(config, weights)


def theirs(net, prompt, n, **how):
    """The n new tokens of transformers' generate, without its own defaults and without an end token."""
    import torch

    how = {"top_k": 0, "top_p": 1.0, "temperature": 1.0} | how if how.get("do_sample") else how
    how |= {"max_new_tokens": n, "eos_token_id": None, "pad_token_id": 0}
    out = net.generate(torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long), **how)
    return out[0, len(prompt) :].tolist()


def test_greedy_is_token_for_token(both):
    """Catches anything in cache, positions or padding that moves a token; our prompts run as one batch of different lengths."""
    ours, net = both
    prompts = [PROMPTS[0], PROMPTS[1][:3], PROMPTS[1]]
    rows = generate(ours, [Request(p, Settings(temperature=0, max_tokens=24)) for p in prompts])
    assert [r.tokens for r in rows] == [theirs(net, p, 24, do_sample=False) for p in prompts]
    assert greedy(ours, PROMPTS, 5).tolist() == [theirs(net, p, 5, do_sample=False) for p in PROMPTS]


@pytest.mark.parametrize("sampler", SAMPLERS, ids=str)
def test_sampling_with_torch_s_own_random_numbers(both, sampler):
    """torch.multinomial races exponential clocks, as we can. Catches a cut in another order or at another place, on 40 tokens: each
    feeds the next, so one that differs changes all that follow."""
    import torch

    class Torch:
        def standard_exponential(self, n):
            return torch.empty(1, n).exponential_()[0].double().numpy()

    ours, net = both
    torch.manual_seed(5)
    expected = theirs(net, PROMPTS[0], 40, do_sample=True, **sampler)
    torch.manual_seed(5)
    got = generate(ours, [Request(PROMPTS[0], Settings(max_tokens=40, **sampler), by_race(Torch()))])[0].tokens
    assert got == expected and len(set(got)) > 5


def test_sampling_with_the_same_uniform_numbers(both, monkeypatch):
    """Catches `inverse` cumulating in another order: in their generate only torch.multinomial is replaced, by its textbook form."""
    import torch

    numbers = np.random.default_rng(3)

    def multinomial(p, num_samples):
        u, total = numbers.random(), 0.0
        for token, part in enumerate(p[0].double().tolist()):
            total += part
            if u < total:
                return torch.tensor([[token]])
        raise AssertionError("the probabilities do not reach 1")

    ours, net = both
    monkeypatch.setattr(torch, "multinomial", multinomial)
    expected = theirs(net, PROMPTS[1], 40, do_sample=True, temperature=1.4, top_p=0.95)
    s = Settings(temperature=1.4, top_p=0.95, max_tokens=40)
    assert generate(ours, [Request(PROMPTS[1], s, by_inverse(np.random.default_rng(3)))])[0].tokens == expected


@pytest.mark.parametrize(("beams", "penalty"), [(1, 1.0), (3, 1.0), (4, 0.0), (5, 2.0)])
def test_beams(both, beams, penalty):
    """Catches beams continued from the wrong cache, and scores of another length penalty. (early_stopping="never" is exact.)"""
    ours, net = both
    how = {"num_beams": beams, "length_penalty": penalty, "early_stopping": "never", "do_sample": False}
    found = beam_search(ours, PROMPTS[0], beams=beams, max_tokens=8, length_penalty=penalty)
    assert list(found[0].tokens) == theirs(net, PROMPTS[0], 8, **how)


def test_beams_that_end(both):
    """Catches an end token that takes a beam's place for good, or one that goes on after its end."""
    import torch

    ours, net = both
    how = {
        "num_beams": 4,
        "num_return_sequences": 4,
        "early_stopping": "never",
        "do_sample": False,
        "length_penalty": 0.0,
    }
    how |= {"return_dict_in_generate": True, "output_scores": True, "max_new_tokens": 9, "pad_token_id": 0}
    ended = set()
    for eos in (8, 43, 117, 57):
        mask = torch.ones(1, len(PROMPTS[0]), dtype=torch.long)
        out = net.generate(torch.tensor([PROMPTS[0]]), attention_mask=mask, eos_token_id=eos, **how)
        found = beam_search(ours, PROMPTS[0], beams=4, max_tokens=9, eos=(eos,), length_penalty=0.0)
        for row, beam in zip(out.sequences[:, len(PROMPTS[0]) :].tolist(), found, strict=True):
            assert row == [*beam.tokens] + [eos] * (len(row) - len(beam.tokens))  # their filling
        np.testing.assert_allclose([b.score for b in found], out.sequences_scores.numpy(), rtol=1e-5)  # sums in float32
        ended |= {len(b.tokens) for b in found}
    assert len(ended) > 2


# ---- Text

TEMPLATE = """{{ bos_token }}{% for m in messages %}
    {%- if m.role == 'system' %}{{ m.content | trim }}
    {% elif m.role == 'user' %}<User>{{ m.content }}{% else %}{{ raise_exception('roles: ' ~ m.role) }}{% endif %}
    {%- if loop.index > 8 %}{% break %}{% endif %}
{% endfor %}
{{ {'a': '<é>'} | tojson }}
{% if add_generation_prompt %}<Assistant>{% endif %}"""
TEXT = "Naïve 漢字, 🙂🙃 and <User> \n\n tabs\t."


def saved(folder, **settings):
    """A byte-level BPE tokenizer with a few merges, as DeepSeek-V3's is one, and its settings."""
    import tokenizers as tk

    inner = tk.Tokenizer(tk.models.BPE())
    inner.pre_tokenizer = tk.pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = tk.decoders.ByteLevel()
    alphabet = tk.pre_tokenizers.ByteLevel.alphabet()
    special = ["<bos>", "<eos>", "<User>", "<Assistant>"]
    trainer = tk.trainers.BpeTrainer(
        vocab_size=300, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    inner.train_from_iterator([TEXT] * 3, trainer)
    inner.save(str(folder / "tokenizer.json"))
    base = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<bos>",
        "eos_token": {"__type": "AddedToken", "content": "<eos>"},
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(base | {"chat_template": TEMPLATE} | settings))
    return Tokenizer.open(folder)


def test_a_text_s_tokens_and_a_conversation_s_prompt(tmp_path):
    """Catches a template rendered with other white space, `tojson` with HTML escapes, a begin token missing or twice."""
    import transformers

    ours = saved(tmp_path)
    fast = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)
    assert ours.encode(TEXT) == fast(TEXT)["input_ids"]
    assert ours.decode(ours.encode(TEXT)) == TEXT.replace("<User>", "")
    messages = [{"role": "system", "content": " be short "}, {"role": "user", "content": TEXT}]
    expected = fast.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert ours.chat(messages) == expected
    assert ours.eos == (1,)
    assert saved(tmp_path, add_bos_token=True).encode("a")[:1] == [0]
    assert ours.chat(messages).count(0) == 1


def test_text_that_streams_is_the_whole_text(tmp_path):
    """Catches half characters given out as U+FFFD, and characters lost where tokens are decoded one by one."""
    from refimpl.infer.text import TextStream

    ours = saved(tmp_path)
    ids = [i for c in TEXT for i in ours.encode(c)]  # one token a byte, mostly
    stream = TextStream(ours.decode)
    pieces = [stream.push(i) for i in ids]
    assert len(ids) > len(TEXT) and "" in pieces
    assert "".join(pieces) + stream.finish() == ours.decode(ids)
    assert not any("\ufffd" in p for p in pieces)


def test_the_command_s_way_from_text_to_text(tmp_path, capsys):
    """Catches a prompt without its template, special tokens in the text, the wrong file's end token, a stop text that is shown."""
    ours, config = saved(tmp_path), SMALL.replace(vocab_size=300)
    weights = {n: w.astype(np.float32) for n, w in make_weights(config.to_dict(), np.random.default_rng(0)).items()}
    save(tmp_path, weights, config, dtype="float32")
    impl = Impl().load(config, weights)

    def said(*args):
        assert main(["generate", str(tmp_path), "--max-tokens", "40", *args]) == 0
        return capsys.readouterr().out.removesuffix("\n")

    def text(prompt, **how):
        settings = Settings(temperature=0, max_tokens=40, **how)
        return generate(impl, [Request(prompt, settings, decode=ours.decode)])[0]

    whole = text(ours.encode(TEXT))
    assert said("--prompt", TEXT) == said("--prompt", TEXT, "--stream") == whole.text == ours.decode(whole.tokens)
    chat = [{"role": "system", "content": "x"}, {"role": "user", "content": "hi"}]
    assert said("--prompt", "hi", "--chat", "--system", "x") == text(ours.chat(chat)).text
    stop = whole.text[5:8]
    assert said("--prompt", TEXT, "--stop", stop) == whole.text[: whole.text.find(stop)]
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [whole.tokens[4]]}))
    assert said("--prompt", TEXT) == text(ours.encode(TEXT), eos=(whole.tokens[4],)).text
    assert said("--prompt", TEXT, "--ignore-eos") == whole.text


def test_templates_that_fail(tmp_path):
    """Catches a traceback of Jinja, or worse a prompt: syntax, its own refusal, missing names, a way out of the sandbox."""
    user = [{"role": "user", "content": "hi"}]
    for template, says in (
        ("{% if %}", "TemplateSyntaxError"),
        ("{{ raise_exception('no tools here') }}", "no tools here"),
        ("{{ messages[7].content }}", "UndefinedError"),
        ("{{ 1 // 0 }}", "ZeroDivisionError"),
        ("{{ messages.append(1) }}", "SecurityError"),
        ("{{ ''.__class__.__mro__ }}", "SecurityError"),
    ):
        with pytest.raises(SpecError, match=f"the chat template failed.*{says}"):
            saved(tmp_path, chat_template=template).chat(user)
    with pytest.raises(SpecError, match="roles: tool"):
        saved(tmp_path).chat([{"role": "tool", "content": ""}])
    with pytest.raises(SpecError, match="message 0 is 'hi'"):
        saved(tmp_path).chat(["hi"])
    with pytest.raises(SpecError, match="no chat template"):
        saved(tmp_path, chat_template=None).chat(user)
    (tmp_path / "chat_template.jinja").write_text("<User>hi<Assistant>")
    assert saved(tmp_path, chat_template="{% if %}").chat(user) == saved(tmp_path).encode("<User>hi<Assistant>")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(SpecError, match="is no tokenizer"):
        Tokenizer.open(tmp_path)
