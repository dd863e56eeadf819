"""`fivefold doctor` and `fivefold bench`, on what this machine has."""

import json
import os
import subprocess
import sys

import pytest
from typer.testing import CliRunner

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
    lines = done.stdout.splitlines()[-len(rows) :]
    for row, line in zip(rows, lines, strict=True):
        assert f"{row['context']:,} " in line and f" {row.get('recipe', row.get('kernel'))} " in line
        time = row.get("ms", row.get("seconds"))
        assert f" {time:.4f} " in line or f" {time:.2f} " in line
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
    settings = "--context", "300", "--memory", "12000000", "--steps", "1", "--recipe", "kivi(bits=2)"
    rows = rows_of(tmp_path, "capacity", *settings)
    assert [(row["what"], row["recipe"]) for row in rows] == [
        ("batch", "DynamicCache"), ("batch", "kivi(bits=2)"), ("context", "DynamicCache"), ("context", "kivi(bits=2)"),
    ]  # fmt: skip
    for row in rows:
        assert row["cache_bytes"] < 13e6 and row["ms"] > 0
    one = 4 * 2 * 2 * 64 * 4 * 300  # four layers, two heads, keys and values, 64 channels of 4 bytes
    assert rows[0]["batch"] == 12000000 // (one * 5 // 4) and rows[1]["batch"] > rows[0]["batch"]
    assert rows[3]["context"] > 2 * rows[2]["context"]
