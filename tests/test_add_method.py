"""CONTRIBUTING's "add a method in one file", done as it is written there."""

import importlib
import re
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import fivefold
from fivefold import methods
from fivefold.errors import CodecError
from fivefold.recipe import describe
from fivefold.store import PageLayout


@pytest.fixture
def from_contributing(tmp_path, monkeypatch):
    """Puts the code block that names a file into a module and imports it."""
    loaded = []

    def load(name):
        text = (Path(__file__).parents[1] / "CONTRIBUTING.md").read_text()
        code = next(block for block in re.findall(r"```python\n(.*?)```", text, re.S) if f"{name}.py" in block)
        (tmp_path / f"my_{name}.py").write_text(code)
        loaded.append(f"my_{name}")
        return importlib.import_module(f"my_{name}")

    monkeypatch.syspath_prepend(tmp_path)
    methods.registered()
    monkeypatch.setattr(methods, "_methods", dict(methods._methods))
    yield load
    for name in loaded:
        sys.modules.pop(name)


@pytest.fixture
def float8(from_contributing):
    return from_contributing("float8")


def test_one_file_is_enough(float8):
    assert any(row["name"] == "float8" for row in describe())
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97, hidden_size=128, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.1,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    ids = torch.randint(0, 97, (1, 300))
    with torch.inference_mode():
        exact = model(ids).logits[0, -1].softmax(-1)
        windows = "streaming(recent=2000) + duo(retrieval=[[0, 0]], recent=400)"
        for recipe in ("float8()", f"float8(residual=0) + {windows}"):
            cache = fivefold.compress(model, recipe)
            model(ids[:, :-1], past_key_values=cache)
            packed = model(ids[:, -1:], past_key_values=cache).logits[0, -1].softmax(-1)
            # Three mantissa bits cost something, and not much.
            assert 1e-4 < (packed - exact).abs().sum() < 0.2
            assert cache.report().codes > 0
    full = fivefold.compress(model, "full()")
    model.generate(ids, past_key_values=full, max_new_tokens=4)
    small = fivefold.compress(model, "float8()")
    model.generate(ids, past_key_values=small, max_new_tokens=4)
    assert small.report().total < 0.5 * full.report().total


def test_a_codec_fills_its_whole_page(float8, tiny, monkeypatch):
    """What a page lacks would be read as it is, and what the layout does not know would be asked for in vain."""
    real, model = float8.Float8Codec, tiny("llama", num_hidden_layers=2)
    ids = torch.randint(0, 97, (1, 300))

    class Lacks(real):
        def encode(self, keys, values, slot, opened):
            fields = super().encode(keys, values, slot, opened)
            del fields["values8"]
            return fields

    class More(real):
        def __init__(self, head_dim):
            super().__init__(head_dim)
            self.layout = PageLayout("float8", 64, self.layout.fields[:1])

    for codec, said in (
        (Lacks, r"Lacks \(float8\) leaves out the field 'values8' of its page: return it from encode"),
        (More, r"More \(float8\) makes a field 'values8', which its page does not have: add a Field of that name"),
    ):
        monkeypatch.setattr(float8, "Float8Codec", codec)
        for recipe in ("float8()", "minicache(start=0) + float8()", "h2o(keep=0.5) + float8()"):
            cache = fivefold.compress(model, recipe)
            with pytest.raises(CodecError, match=said), torch.inference_mode():
                model(ids, past_key_values=cache)
            assert cache.get_seq_length() == 0 and cache.report().total == 0


def test_a_name_cannot_be_taken_twice(float8):
    with pytest.raises(ValueError, match="taken"):
        methods.register(slot="bits", name="kivi", paper="")(float8.Float8)
    with pytest.raises(ValueError, match="unknown slot"):
        methods.register(slot="bytes", name="other", paper="")


def test_a_policy_of_a_few_lines(from_contributing):
    from_contributing("tova")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.3,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    model.set_attn_implementation("eager")
    ids = torch.randint(0, 97, (1, 200))
    with torch.inference_mode():
        attention = model(ids, output_attentions=True).attentions[0][0, :, -1]
        cache = fivefold.compress(model, "tova(keep=0.25)")
        model(ids, past_key_values=cache)
    (group,) = cache.session.stores[0].groups
    most = attention.unflatten(0, (2, 2)).sum(1).topk(50).indices.sort().values
    assert torch.equal(group.held.positions.sort(1).values.long(), most)


def test_a_class_that_is_no_dataclass_is_refused_where_it_is_written():
    with pytest.raises(TypeError, match=r"Bare is no dataclass: write @dataclass\(frozen=True\) below"):

        @methods.register(slot="bits", name="bare", paper="none")
        class Bare(methods.Method):
            pass

    assert "bare" not in methods.registered()
