"""`fivefold plan` as a user meets it: what it prints, writes and refuses."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from fivefold.cli.app import app
from fivefold.errors import InputError
from fivefold.plan import advise, quality
from fivefold.plan.machine import find_machine
from fivefold.plan.read import read_model
from fivefold.plan.room import Place
from fivefold.plan.target import Target
from fivefold.recipe import Recipe

MODEL = "llama-3.1-8b"


def run(*args: Any) -> Any:
    return CliRunner().invoke(app, ["plan", *map(str, args)])


def planned(tmp_path: Path, *args: Any) -> dict[str, Any]:
    target = tmp_path / "plan.json"
    done = run(MODEL, "--gpu", "h100", *args, "--json", target)
    assert done.exit_code == 0, done.stderr
    return json.loads(target.read_text())


@pytest.mark.slow
def test_a_plan(tmp_path: Path) -> None:
    found = planned(tmp_path, "-r", "full()", "-r", "kivi(bits={2,4})", "-c", 32768)
    rows = {row["recipe"]: row for row in found["rows"]}
    assert list(rows) == ["full()", "kivi(bits=2)", "kivi(bits=4)"]
    assert found["memory"]["weights"] == 2 * 8_030_261_248
    # Keys and values of 32 layers, 8 heads and 128 channels in bfloat16, in whole pages: all of them are full here.
    assert rows["full()"]["parts"]["exact"] == 32768 * 131072
    assert rows["kivi(bits=2)"]["users"] > rows["kivi(bits=4)"]["users"] > rows["full()"]["users"] > 10
    for row in rows.values():
        assert row["bytes"] == sum(value for name, value in row["parts"].items() if name != "total")
        assert sum(term["seconds"] for term in row["terms"]) == pytest.approx(row["step_ms"] / 1000)
        assert row["tokens_s"] == pytest.approx(1000 * row["users"] / row["step_ms_most"])
        contexts = [point["context"] for point in row["by_context"]]
        assert contexts == sorted(contexts) and contexts[-1] == 131072
        users = [point["users"] for point in row["by_context"]]
        assert users == sorted(users, reverse=True)
    assert found["chosen"] == "full()" and "what the others cost in quality is not known" in found["said"].lower()
    assert "fivefold.compress(model" in found["run"]["python"] and "vllm serve MODEL" in found["run"]["vllm"]


def test_what_is_printed_says_what_is_asked(tmp_path: Path) -> None:
    done = run(MODEL, "--gpu", "h100", "-r", "kivi(bits=2)", "--users", 4, "-c", 8192, "--explain")
    assert done.exit_code == 0
    for words in (
        "8.03B parameters",
        "8,192 tokens a user, 4 users",
        "kivi(bits=2)",
        "weights: ",
        " GB / ",
        "--max-batch 4",
    ):
        assert words in done.stdout, words
    assert "bound by" in done.stdout  # by what each time is bound


@pytest.mark.slow
def test_a_target_that_is_met_and_one_that_is_not(tmp_path: Path) -> None:
    able = planned(tmp_path, "-r", "full()", "-r", "kivi(bits=4)", "-c", 131072, "--target", "users=6,ms=30")
    assert able["chosen"] == "kivi(bits=4)" and able["users"] == 6
    assert {row["recipe"]: row["meets"] for row in able["rows"]} == {"full()": False, "kivi(bits=4)": True}
    not_able = planned(tmp_path, "-r", "full()", "-c", 131072, "--target", "users=64")
    assert not_able["chosen"] is None and "GPUs would do" in not_able["said"]
    too_fast = planned(tmp_path, "-r", "full()", "-c", 4096, "--target", "ms=1")
    assert too_fast["chosen"] is None and "a step takes" in too_fast["said"] and too_fast["run"]["python"] is None


def test_how_many_gpus_would_do() -> None:
    where = Place(read_model(MODEL), find_machine("h100"))
    gpus, times = advise.gpus_for(Recipe(), where, 131072, 200) or (0, 0)
    wide = Place(where.shape, where.machine, gpus)
    from fivefold.plan.room import most_users

    assert gpus * times > 1 and times * most_users(Recipe(), wide, 131072) >= 200
    assert (times - 1) * most_users(Recipe(), wide, 131072) < 200
    small = advise.gpus_for(Recipe.parse("kivi(bits=2)"), where, 131072, 200) or (99, 99)
    assert small[0] * small[1] < gpus * times


def test_weights_that_do_not_fit_say_how_many_gpus_do() -> None:
    done = run("llama-3-70b", "--gpu", "h100", "-r", "full()", "-c", 4096)
    assert done.exit_code == 0 and "Nothing fits" in done.stdout and "--gpus 2" in done.stdout


@pytest.mark.slow
def test_quality_is_what_was_measured_or_unknown(tmp_path: Path) -> None:
    """The front is of what is known, and the choice too."""
    cells = [
        {"recipe": name, "suite": "fidelity", "context": 2048, "kl": kl, "kl_low": kl / 2, "kl_high": kl * 2}
        for name, kl in (("DynamicCache", 0.0), ("kivi(bits=4)", 0.004), ("kivi(bits=2)", 0.2), ("kivi(bits=8)", 0.3))
    ]
    file = tmp_path / "eval.json"
    about = {"environment": {"model": MODEL}, "cells": cells, "ranking": []}
    file.write_text(json.dumps(about))
    given = ("-r", "kivi(bits={2,3,4,8})", "-c", 32768, "--quality", file)
    found = planned(tmp_path, *given, "--users", 40)
    rows = {row["recipe"]: row for row in found["rows"]}
    assert rows["kivi(bits=3)"]["quality"] is None and rows["kivi(bits=4)"]["quality"]["kl"] == 0.004
    assert [name for name, row in rows.items() if row["on_front"]] == ["kivi(bits=2)", "kivi(bits=4)"]
    assert found["chosen"] == "kivi(bits=4)"
    assert planned(tmp_path, *given, "--users", 70)["chosen"] == "kivi(bits=2)"
    strict = planned(tmp_path, *given, "--users", 70, "--target", "kl=0.1")
    assert strict["chosen"] is None
    done = run("qwen3-8b", "--gpu", "h100", "-r", "kivi(bits=2)", "--quality", file)
    assert done.exit_code == 0 and "is about" in done.stderr


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"environment": {"model": 1}, "cells": [{}], "ranking": []}'])
def test_a_quality_file_that_is_none(tmp_path: Path, text: str) -> None:
    file = tmp_path / "none.json"
    file.write_text(text)
    with pytest.raises(InputError, match="--quality"):
        quality.read(str(file), 2048)


def test_a_model_with_a_latent_cache_is_planned_exact(tmp_path: Path) -> None:
    """MLA: 576 numbers a token in each of 61 layers; recipes are refused with the reason."""
    done = run("deepseek-v3", "--gpu", "h200", "--gpus", 8, "-c", 32768, "--json", tmp_path / "plan.json")
    assert done.exit_code == 0 and "compressed latent" in done.stderr
    (row,) = json.loads((tmp_path / "plan.json").read_text())["rows"]
    assert row["recipe"] == "full()" and row["bytes"] == 576 * 61 * 2 * 32768
    bad = run("deepseek-v3", "--gpu", "h200", "-r", "kivi(bits=2)")
    assert bad.exit_code == 2 and "compressed latent" in bad.stderr


def test_a_model_of_windows_alone() -> None:
    """As `compress` has it: it takes --sliding to compress what windows hold."""
    bad = run("phi-3-mini", "--gpu", "h100", "-r", "kivi(bits=4)", "-c", 4096)
    assert bad.exit_code == 2 and "--sliding" in bad.stderr
    for more in (("-r", "kivi(bits=4)", "--sliding"), ("-r", "full()"), ()):
        done = run("phi-3-mini", "--gpu", "h100", "-c", 4096, *more)
        assert done.exit_code == 0, done.stderr


@pytest.mark.slow
def test_windows_are_planned_as_they_are_kept(tmp_path: Path) -> None:
    """Gemma 3: windows of 1,024 tokens in five of six layers; --sliding compresses them too."""
    rows = []
    for more in ((), ("--sliding",)):
        target = tmp_path / f"{len(more)}.json"
        done = run("gemma-3-12b", "--gpu", "h100", "-r", "kivi(bits=2)", "-c", 65536, *more, "--json", target)
        assert done.exit_code == 0, done.stderr
        rows.append(json.loads(target.read_text())["rows"][0])
    assert rows[0]["parts"]["sliding"] == 40 * 1023 * 2 * 8 * 256 * 2 and rows[1]["parts"]["sliding"] == 0
    assert rows[1]["bytes"] < rows[0]["bytes"]


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ((), "no model is given"),
        (("nothing", "--gpu", "h100"), "there is no model 'nothing'"),
        ((MODEL, "--gpu", "h101x"), "--gpu 'h101x' is not known"),
        ((MODEL, "--gpu", "h100", "--target", "ms"), "asks for nothing known"),
        ((MODEL, "--gpu", "h100", "--target", "ms=fast"), "is no number"),
        ((MODEL, "--gpu", "h100", "--target", "users=-1"), "is impossible"),
        ((MODEL, "--gpu", "h100", "--target", "ms=nan"), "is impossible"),
        ((MODEL, "--gpu", "h100", "-r", "kivi(bits=5)"), "kivi(bits=5) is not possible"),
        ((MODEL, "--gpu", "h100", "--dtype", "int8"), "--dtype 'int8' is not possible"),
        ((MODEL, "--gpu", "h100", "--quality", "/nowhere.json"), "--quality '/nowhere.json' cannot be read"),
        ((MODEL, "--gpu", "h100", "--json", "/nowhere/at/all.json"), "cannot be written"),
    ],
)
def test_bad_input_is_one_sentence(args: tuple[str, ...], words: str) -> None:
    done = run(*args)
    assert done.exit_code == 2, (done.stdout, done.exception)
    lines = done.stderr.splitlines()
    assert len(lines) == 1 and lines[0].startswith("Error: ") and words in lines[0], lines


def test_without_a_gpu_auto_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FIVEFOLD_CACHE", str(tmp_path))
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    done = run(MODEL)
    assert done.exit_code == 2 and "--gpu auto finds no GPU here" in done.stderr


def test_targets() -> None:
    assert Target.parse("ms=20, users=8") == Target(ms=20.0, users=8.0)
    with pytest.raises(InputError):
        Target.parse("ms=20,,")


def test_nothing_of_transformers_is_imported() -> None:
    """What takes seconds to import is not imported, and no weights are read."""
    code = (
        "import sys; from typer.testing import CliRunner; from fivefold.cli.app import app; "
        f"done = CliRunner().invoke(app, ['plan', '{MODEL}', '--gpu', 'h100', '-r', 'full()']); "
        "assert done.exit_code == 0, done.stderr; assert 'transformers' not in sys.modules, 'transformers'"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.model
@pytest.mark.slow
def test_a_probe_measures_what_recipes_cost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "plan.json"
    given = ("-r", "full()", "-r", "kivi(bits=8)", "-r", "kivi(bits=2)", "-c", 4096)
    done = run("smollm2-135m", "--gpu", "h100", *given, "--probe", "--json", target)
    assert done.exit_code == 0, done.stderr
    rows = {row["recipe"]: row["quality"] for row in json.loads(target.read_text())["rows"]}
    assert rows["full()"]["kl"] < 1e-6 < rows["kivi(bits=8)"]["kl"] < rows["kivi(bits=2)"]["kl"]


def test_a_recipe_that_names_layers_is_searched_too() -> None:
    done = run(MODEL, "--gpu", "h100", "-r", "tidal(select_layers=[2, 13])", "-c", 8192)
    assert done.exit_code == 0, done.stderr


@pytest.mark.slow
def test_capped_scores_have_no_kernel_and_packed_weights_stay_packed(tmp_path: Path) -> None:
    capped = json.loads(json_of(tmp_path, "gemma-2-9b", "-r", "kivi(bits=4)", "-c", 4096))
    assert capped["rows"][0]["step_ms"] is None and "capped" in " ".join(capped["rows"][0]["notes"])
    assert capped["rows"][0]["first_s"] is None
    weights = [
        json.loads(json_of(tmp_path, "gpt-oss-20b", "-r", "full()", "--dtype", dtype))["memory"]["weights"]
        for dtype in ("bfloat16", "float32")
    ]
    assert weights[0] == weights[1]
    shape = read_model("gpt-oss-20b")
    # One user: all that is dense in two bytes, and 4 of 32 experts in 4.25 bits.
    dense = shape.parameters - shape.embedding - shape.routed
    assert shape.read(1) == pytest.approx(2 * dense + shape.routed * 4.25 / 8 * 4 / 32, rel=0.01)


def test_times_in_float32_were_not_measured(tmp_path: Path) -> None:
    (row,) = json.loads(json_of(tmp_path, MODEL, "-r", "full()", "--dtype", "float32"))["rows"]
    assert row["step_ms"] is None and row["first_s"] is None and "float32" in " ".join(row["notes"])


def test_shared_layers_are_read_and_latent_prompts_are_not_predicted(tmp_path: Path) -> None:
    found = json.loads(json_of(tmp_path, "gemma-3n-e4b", "-r", "full()", "-c", 16384))
    (row,) = found["rows"]
    read = sum(term["seconds"] for term in row["terms"] if term["name"].startswith("attention"))
    # 35 layers read: 7 of them (2 shared) the whole text, the others a window of 512; 2 heads of 256 channels.
    token, machine = 2 * 2 * 2 * 256, find_machine("h100")
    whole, window = (machine.attends("exact", 256, token * tokens) for tokens in (16384, 512))
    assert read == pytest.approx(7 * whole + 28 * window, rel=0.02)
    (latent,) = json.loads(json_of(tmp_path, "deepseek-v3", "--gpus", 16))["rows"]
    assert latent["first_s"] is None and latent["step_ms"] is None
    # A latent cache is whole on each GPU.
    assert latent["switch_s"] > latent["bytes"] / machine.to_host


@pytest.mark.slow
def test_lines_that_can_be_run(tmp_path: Path) -> None:
    sliding = json.loads(json_of(tmp_path, "gemma-3-12b", "-r", "kivi(bits=4)", "-c", 8192, "--sliding"))["run"]
    assert "sliding=True" in sliding["python"] and 'from_pretrained("MODEL"' in sliding["python"]
    slow = json.loads(json_of(tmp_path, MODEL, "-r", "gear(bits=2)", "-c", 8192))["run"]
    assert "cuda_graph" not in slow["python"]
    assert json.loads(json_of(tmp_path, MODEL, "-r", "full()", "--gpus", 2))["run"]["python"] is None
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text((Path(__file__).parent / "configs" / "llama-3-8b.json").read_text())
    by_file = json.loads(json_of(tmp_path, folder / "config.json", "-r", "full()", "-c", 4096))["run"]["generate"]
    assert f"--model {folder} " in by_file


def test_measuring_takes_a_gpu() -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    done = run("--measure")
    assert done.exit_code == 2 and "--measure finds no GPU here" in done.stderr


def json_of(tmp_path: Path, model: Any, *args: Any) -> str:
    target = tmp_path / "one.json"
    done = run(model, "--gpu", "h100", *args, "--json", target)
    assert done.exit_code == 0, done.stderr
    return target.read_text()
