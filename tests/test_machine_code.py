"""What kernels in Triton compile to for an H100, which needs no GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton", reason="needs Triton")
SCRIPT = """
import json, re
import triton.language as tl
from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from fivefold.kernels.packed_decode import triton as kernel

pointers = {"queries": "bf16", "table": "i64", "spans": "i32", "starts": "i32", "picks": "i32", "out": "fp32",
            "lse": "fp32", "scores": "fp32"}
types = {**{name: "*" + x for name, x in pointers.items()}, "scale": "fp32", "rows": "i32", "columns": "i32",
         "heads": "i32", "width": "i32"}
names = kernel._exact.arg_names
out = {}
for fields in (2, 6):
    constants = {"DTYPE": tl.bfloat16, "N": 8, "D": 128, "T": 64, "SPAN": 8, "R": 8, "TILE": 64, "WIDE": False,
                 "PICKED": False, "SCORED": False, "EARLY": False, "BEHIND": False, "PDL": False, "FIELDS": fields}
    source = ASTSource(kernel._exact, {name: types.get(name, "constexpr") for name in names}, constants,
                       {(names.index(name),): [["tt.divisibility", 16]] for name in pointers})
    text = compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 2}).asm["ptx"]
    loads = r"ld\\.global\\S*\\.b(8|16) ", r"(ld|cp\\.async)\\S*global"
    out[fields] = [len(re.findall(kind, text)) for kind in loads]
print(json.dumps(out))
"""


def test_exact_pages_are_not_read_number_by_number() -> None:
    """Triton 3.7 did (256 loads of two bytes in place of 32), and still does where a condition is in front of addresses
    that it should know more of (`_row_of`)."""
    env = {name: x for name, x in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, env=env, timeout=300)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    # Scales and zero points of rounded tokens are single numbers.
    assert found["2"][0] == 0 and found["6"][0] <= 16 and min(many for _, many in found.values()) > 8
