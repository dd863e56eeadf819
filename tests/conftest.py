"""Tiny random models of every supported family, made once for the whole run."""

from __future__ import annotations

import gc
import os
import signal
from collections.abc import Callable, Iterable, Iterator
from importlib.util import find_spec
from typing import Any

import pytest

if gc.isenabled():  # again once all is imported and collected, which stays
    gc.disable()
if "PYTEST_XDIST_WORKER_COUNT" in os.environ:  # workers share the cores, and what they start does too
    os.environ["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // int(os.environ["PYTEST_XDIST_WORKER_COUNT"])))

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports Triton

from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
)

import fivefold
import interpreter
from fivefold import interrupts

VOCAB = 131

if not torch.cuda.is_available() and find_spec("triton"):
    interpreter.quicken()

SOME = {
    "test_attention.py": 2, "test_packed_decode_cpu.py": 2, "test_tiers.py": 2, "test_razor.py": 4, "test_ragged.py": 2,
    "test_transactions.py": 7, "test_families.py": 2, "test_plan_memory.py": 2, "test_sequences.py": 2,
    "test_convert.py": 2, "test_layer_cache.py": 2, "test_saving.py": 2,
    "test_together.py": 7, "test_torch_compile.py": 5, "test_watched.py": 5, "test_codec_steps.py": 3,
    "test_planar_decode.py": 3, "test_memory.py": 4, "test_broken_steps.py": 5,
}  # fmt: skip
"""Of the slow tests of these files, which are like each other, CI runs one in so many; a release runs all."""
ALONE = {"test_chunks.py", "test_generation.py", "test_not_finite.py", "test_turns.py"}
"""Where CI runs every method alone, and a release in pairs and variants too."""
QUICK = {
    "test_a_failure_at_any_operation": (5, 0), "test_a_full_cache": (3, 0), "test_copies_are_equal_or_refused": (3, 1),
    "test_a_failure_on_one_side_of_a_fork": (3, 2), "test_memory_that_cannot_be_had": (3, 0),
    "test_assisted_decoding_ends": (3, 1), "test_each_request_gets_what_it_gets_alone": (3, 2),
    "test_a_prompt_in_chunks": (3, 0), "test_reordered_rows_go_on_as_what_they_were": (3, 1),
    "test_beams_have_the_scores_of_their_sequences": (3, 2), "test_no_token_depends_on_what_is_found": (3, 0),
    "test_every_method": (4, 0), "test_the_cap_holds_for_everything": (3, 1),
    "test_forks_of_a_text_that_comes_token_by_token": (3, 0), "test_packed_tokens_that_came_one_by_one": (3, 0),
    "test_what_comes_token_by_token_is_held_to_its_budget": (3, 1), "test_a_chunk_that_fails_as_it_writes": (5, 2),
    "test_ctrl_c_in_a_step": (6, 1), "test_ctrl_c_in_another_change": (5, 2),
    "test_a_step_that_is_broken_off_at_the_floor": (3, 1), "test_a_single_token_beside_a_longer_prompt": (3, 2),
    "test_forks_crops_and_beams": (3, 0), "test_a_text_in_chunks_ends_with_few_free_pages": (4, 0),
    "test_the_bytes_are_those_of_the_reference": (3, 0),
    "test_bounds_are_what_a_simulation_of_every_token_says": (4, 0), "test_it_is_the_papers_equations": (3, 0),
    "test_left_padding": (4, 0), "test_speculative_decoding": (3, 0),
    "test_combinations_generate_the_same_again_and_in_batches": (3, 2),
    "test_keys_before_rope_are_those_of_the_model": (3, 0),
    "test_choices_are_different_hold_the_answer_once_and_are_balanced": (2, 0),
    "test_each_sequence_is_as_if_alone": (3, 0), "test_every_method_refuses_what_is_no_number": (3, 2),
    "test_a_codec_packs_what_is_chosen": (2, 0), "test_combinations_stay_near_what_they_pack": (3, 0),
    "test_attending_in_compressed_form_is_attending_to_what_is_decoded": (5, 0), "test_a_wrong_kernel_is_found": (3, 0),
    "test_random_picks": (3, 1), "test_sequences_come_and_go": (3, 2), "test_what_comes_back_is_what_there_was": (3, 1),
    "test_rows_of_different_lengths": (3, 0), "test_tokens_are_those_of_the_dynamic_cache": (3, 0),
    "test_beside_other_methods": (2, 0), "test_windows_of_the_text": (5, 0), "test_combinations": (3, 0),
    "test_forks_go_their_own_ways": (3, 1), "test_a_session_goes_on_where_it_was": (3, 0),
    "test_undo_leaves_no_trace": (3, 1), "test_groups_are_packed_where_they_lie_to_the_same_bytes": (6, 0),
    "test_outputs_are_those_of_modules_that_give_zeros": (5, 0), "test_the_total_is_what_there_is": (3, 0),
    "test_assistants_may_guess_any_number_of_tokens": (3, 1), "test_keeping_everything_is_exact": (3, 0),
    "test_sequences_of_a_batch_choose_as_if_alone": (3, 1), "test_budgets_hold_while_generating": (3, 2),
    "test_random_rows": (2, 0),
}  # fmt: skip
"""Of these tests the README's command runs one parameter in so many, from another first one in each, so that every
method is in some of them; CI runs all."""


def quick(values: Iterable[Any], count: int, most: int | None = None) -> list[Any]:
    """Parameters of a test: so many for the README's command, up to `most` of the others, which are like them, for CI
    too, and the rest before a release."""
    out = list(values)
    for i in range(count, len(out)):
        rare = most is not None and i >= most
        out[i] = pytest.param(out[i], marks=[pytest.mark.slow, *([pytest.mark.release] if rare else [])])
    return out


# Grouped, single (MQA) and equally many (MHA) kv heads; head dims 64, 96, 128 and 256. A wide initialisation, so that
# attention is not nearly uniform and greedy output is not one token for ever.
_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "max_position_embeddings": 4096,
    "initializer_range": 0.25,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
FAMILIES: dict[str, tuple[type, dict[str, Any]]] = {
    "llama": (LlamaConfig, {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64}),
    "mistral": (
        MistralConfig,
        {
            "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 128,
            "sliding_window": None,
        },
    ),
    "qwen2": (Qwen2Config, {"hidden_size": 128, "num_attention_heads": 2, "num_key_value_heads": 2}),
    "qwen3": (Qwen3Config, {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 128}),
    "phi3": (
        Phi3Config,
        {"hidden_size": 192, "num_attention_heads": 2, "num_key_value_heads": 1, "initializer_range": 0.15},
    ),
    "gemma3_text": (
        Gemma3TextConfig,
        {
            "hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 256,
            "num_hidden_layers": 4, "sliding_window": 24,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
        },
    ),
    "gpt_neox": (GPTNeoXConfig, {"hidden_size": 128, "num_attention_heads": 2}),
}  # fmt: skip


def build(family: str, seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """A random model of a family, always the same one for the same arguments."""
    kind, settings = FAMILIES[family]
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(kind(**{**_COMMON, **settings, **changes})).to(dtype).eval()


# Where kernels are tested: compiled on a GPU, else in Triton's interpreter.
DEVICES = [
    pytest.param(
        "cpu", marks=pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels are compiled for the GPU here")
    ),
    pytest.param(
        "cuda",
        marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")],
    ),
]
# FIVEFOLD_KERNELS there: what a user of a GPU gets; the interpreter has to be asked for.
KERNELS = "auto" if torch.cuda.is_available() else "triton"


@pytest.fixture(scope="session")
def _models() -> dict[str, Any]:
    return {}


@pytest.fixture
def tiny(_models: dict[str, Any]) -> Iterator[Callable[..., Any]]:
    """`tiny("llama", seed=1, num_hidden_layers=2)`: a random model, unprepared, on SDPA. Shared between tests, and
    restored after each: do not change its weights."""
    used = []

    def get(family: str = "llama", **changes: Any) -> Any:
        key = f"{family} {sorted(changes.items())}"
        if key not in _models:
            _models[key] = build(family, **changes)
        used.append(_models[key])
        return _models[key]

    yield get
    for model in used:
        fivefold.restore(model)
        model.set_attn_implementation("sdpa")


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """Ctrl-C as in a program that does nothing about it; what runs in the background may not hear of it else."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    signal.signal(signal.SIGINT, before)
    interrupts.uninterrupted._late = None


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """For tests on tiny tensors, where more threads only get in each other's way."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def touched() -> Iterator[list[torch.Tensor]]:
    """What a kernel in Triton's interpreter may touch besides its arguments."""
    from memory import checked

    also: list[torch.Tensor] = []
    with checked(also=also):
        yield also


def pytest_collection_finish() -> None:
    """What is imported and collected stays: Python need not look through it for cycles again and again."""
    gc.collect()
    gc.freeze()
    gc.enable()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A test over the list of recipes runs each method alone in the README's command, and its pairs and variants, which
    take as long again, where the slow tests run."""
    from recipes import VARIANTS  # it needs this module

    for item in items:
        params = item.callspec.params if isinstance(item, pytest.Function) and hasattr(item, "callspec") else {}
        if params.get("name") in VARIANTS:
            item.add_marker(pytest.mark.slow)
            if item.path.name in ALONE:
                item.add_marker(pytest.mark.release)
    seen: dict[str, int] = {}
    for item in items:
        every = SOME.get(item.path.name)
        if every and item.get_closest_marker("slow"):
            seen[item.path.name] = number = seen.get(item.path.name, -1) + 1
            if number % every:
                item.add_marker(pytest.mark.release)
    number: dict[str, int] = {}
    for item in items:
        name = item.name.split("[")[0]
        if name in QUICK and not item.get_closest_marker("slow"):
            every, first = QUICK[name]
            number[item.nodeid.split("[")[0]] = at = number.get(item.nodeid.split("[")[0], -1) + 1
            if at % every != first:
                item.add_marker(pytest.mark.slow)
