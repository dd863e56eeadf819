"""`fivefold doctor` and `fivefold bench`, on what this machine has."""

import json
import os
import subprocess
import sys

import pytest
import torch
from typer.testing import CliRunner

from fivefold.benchmark import decode, peers
from fivefold.cli.app import app


def run(*args: str, **env: str) -> subprocess.CompletedProcess[str]:
    """In a process of its own where the environment is to be another."""
    if not env:
        done = CliRunner().invoke(app, args)
        return subprocess.CompletedProcess(args, done.exit_code, done.stdout, done.stderr)
    return subprocess.run(
        [sys.executable, "-m", "fivefold", *args], capture_output=True, text=True, env={**os.environ, **env}
    )


def rows_of(folder, command: str, *args: str) -> list[dict]:
    """What `fivefold bench COMMAND` wrote. What it printed has a whole line for each row, through a pipe."""
    target = folder / "rows.json"
    done = run("bench", command, *args, "--json", str(target))
    assert done.returncode == 0, done.stderr
    rows = json.loads(target.read_text())["rows"]
    lines = [f" {line} " for line in done.stdout.splitlines()]
    for row in rows:
        named = f" {row['context']:,} ", f" {row.get('recipe', row.get('kernel'))} "
        time = row.get("ms", row.get("seconds"))
        times = f" {time:.4f} ", f" {time:.2f} "
        assert any(all(part in line for part in named) and any(part in line for part in times) for line in lines)
    return rows


def test_doctor_says_which_path_runs_and_why() -> None:
    found = json.loads(run("doctor", "--json", FIVEFOLD_KERNELS="reference").stdout)
    assert found["torch"] and found["devices"][0]["path"] == "reference"
    assert found["devices"][0]["why"] == "FIVEFOLD_KERNELS=reference"
    said = found["devices"][0]["decoding"]
    assert said["full()"] == said["kivi()"] == "plain PyTorch in 32 of 32 layers (FIVEFOLD_KERNELS=reference)"
    bad = run("doctor", FIVEFOLD_KERNELS="fast")
    assert bad.returncode == 2 and "fast is none of auto, reference, cpp, triton, cuda" in bad.stderr


def test_bench_kernels(tmp_path) -> None:
    rows = rows_of(tmp_path, "kernels", "--size", "500x2", "--recipe", "kivi(bits=4)")
    packed = next(row for row in rows if row["kernel"] == "kivi(bits=4)")
    assert packed["context"] == 500 and packed["batch"] == 2 and packed["ms"] > 0
    # 500 tokens: 11 groups of 32 are packed in three pages, and 148 tokens are exact.
    page = 2 * 32 * 128 * 2 + 2 * 4 * 128 * 2 + 2 * 4 * 32 * 4 * 2
    assert packed["bytes"] == 16 * (3 * page + 148 * 2 * 128 * 2)


@pytest.mark.parametrize("recipe", ["duo(keep=0.5) + rotatekv(bits=4)", "rotatekv(bits=4)"])
def test_a_cache_is_filled_whatever_heads_stand_alike(recipe: str) -> None:
    shape = {"hidden_size": 128, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 2}
    model = decode.build({"vocab_size": 64, "num_hidden_layers": 4, **shape}, torch.device("cpu"))
    cache = decode.filled(model, recipe, 300, 2, False)
    for store in cache.session.stores.values():
        assert (store.lengths() == 300).all()
        assert store.learned["sink_keys"].isfinite().all()


def test_bench_kernels_where_all_tokens_are_packed(tmp_path) -> None:
    rows = rows_of(tmp_path, "kernels", "--size", "256", "--recipe", "gear(residual=0)")
    assert next(row for row in rows if row["kernel"] == "gear(residual=0)")["ms"] > 0


def test_bench_prefill(tmp_path) -> None:
    recipes = "full()", "duo(keep=0.5) + h2o(keep=0.25)"
    rows = rows_of(tmp_path, "prefill", "--size", "600", "--chunk", "256", "-r", recipes[0], "-r", recipes[1])
    assert [row["recipe"] for row in rows] == ["DynamicCache", *recipes]
    assert rows[0]["times"] == 1 and all(row["seconds"] > 0 for row in rows)
    one = 4 * 2 * 2 * 64 * 4  # four layers, two heads, keys and values, 64 channels of 4 bytes
    assert rows[0]["cache_bytes"] == 600 * one and rows[2]["cache_bytes"] < 0.5 * rows[1]["cache_bytes"]
    bad = run("bench", "prefill", "--shape", "huge")
    assert bad.returncode == 2 and "'huge' is none of llama-3-8b, llama-3.2-1b, small" in bad.stderr


@pytest.mark.parametrize("size", ["", "0", "12x0", "x4", "many"])
def test_sizes_that_are_none(size: str) -> None:
    bad = run("bench", "decode", "--size", size)
    assert bad.returncode == 2 and "is no size" in bad.stderr


def test_bench_capacity(tmp_path) -> None:
    settings = "--context", "300", "--memory", "12000000B", "--steps", "1", "--recipe", "kivi(bits=2)"
    rows = rows_of(tmp_path, "capacity", *settings)
    assert [(row["what"], row["recipe"]) for row in rows] == [
        ("batch", "DynamicCache"), ("batch", "kivi(bits=2)"), ("context", "DynamicCache"), ("context", "kivi(bits=2)"),
    ]  # fmt: skip
    for row in rows:
        assert row["cache_bytes"] < 13e6 and row["ms"] > 0
    one = 4 * 2 * 2 * 64 * 4 * 300  # four layers, two heads, keys and values, 64 channels of 4 bytes
    assert rows[0]["batch"] == 12000000 // (one * 5 // 4) and rows[1]["batch"] > rows[0]["batch"]
    assert rows[3]["context"] > 2 * rows[2]["context"]


def test_bench_decode(tmp_path) -> None:
    """Steps are timed once a group has been packed."""
    rows = rows_of(tmp_path, "decode", "--size", "70", "--steps", "2", "-r", "kivi(bits=2)")
    assert [row["recipe"] for row in rows] == ["DynamicCache", "kivi(bits=2)"]
    assert all(row["steps"] == 2 and row["warm_up"] >= 40 and row["gain"] > 0 for row in rows)
    one = 4 * 2 * 2 * 64 * 4  # four layers, two heads, keys and values, 64 channels of 4 bytes
    assert rows[0]["cache_bytes"] == (70 + rows[0]["warm_up"] + 2) * one
    assert rows[0]["version"].startswith("transformers ") and rows[1]["version"].startswith("fivefold ")


def test_a_peer_that_is_not_here() -> None:
    import torch

    model = decode.build("small", torch.device("cpu"))
    absent = peers.Peer("none", (("no-such-package", "no_such_package"),), peers._pressed)
    assert peers.measure(model, absent, 9, 1, 1)["error"] == "not installed: pip install no-such-package"

    def fails(*_: object) -> None:
        raise KeyError("cache_position")

    row = peers.measure(model, peers.Peer("fails", (("torch", "torch"),), fails), 9, 1, 1)
    assert row["error"] == "does not run here: KeyError: 'cache_position'"
    assert row["version"].startswith("transformers ") and ", torch " in row["version"]


def test_what_a_peer_holds() -> None:
    """Every storage once, wherever it is: in lists, objects, and tensors made of tensors."""
    import torch

    one, other = torch.zeros(10), torch.zeros(4, dtype=torch.uint8)
    layer = type("Layer", (), {})()
    layer.codes, layer.meta, layer.itself = (other, {"scale": one[:3]}), [one], layer
    assert peers.alive(layer) == 44


@pytest.mark.slow
def test_bench_decode_beside_peers(tmp_path) -> None:
    target = tmp_path / "rows.json"
    done = run("bench", "decode", "--size", "60", "--steps", "1", "-r", "full()", "--peers", "--json", str(target))
    rows = json.loads(target.read_text())["rows"]
    assert done.returncode == 0 and [row["recipe"] for row in rows[2:]] == [peer.name for peer in peers.PEERS]
    static = next(row for row in rows if row["recipe"].startswith("StaticCache"))
    assert static["ms"] > 0 and static["cache_bytes"] > rows[0]["cache_bytes"]
    assert all("error" in row or row["ms"] > 0 for row in rows) and all(row["version"] in done.stdout for row in rows)
