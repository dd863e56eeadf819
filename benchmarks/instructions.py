"""What the packed decoding kernels compile to for an H100: registers, spills, instructions per number of their loop.

python benchmarks/instructions.py

Needs Triton, and for the kernel in CUDA C++ cuda-bindings and NVRTC, but no GPU. A thread-instruction per number of
keys and values: an H100 issues 29.7e12 a second in all.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fivefold.kernels.packed_decode import Form, cuda
from fivefold.kernels.packed_decode import triton as kernel

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
WARPS = 2


def compiled(form: Form) -> triton.compiler.CompiledKernel:
    """`_packed` as a step of eight rows with four query heads each launches it."""
    types = {
        "queries": "*bf16", "table": "*i64", "spans": "*i32", "starts": "*i32", "out": "*fp32", "lse": "*fp32",
        "scale": "fp32", "rows": "i32", "columns": "i32", "heads": "i32",
    }  # fmt: skip
    stages = kernel._STAGES[form.bits]
    constants = {
        "N": 8, "D": form.head_dim, "BITS": form.bits, "GROUP": form.group, "CHANNELS": form.channels,
        "SPAN": kernel.SPAN, "R": 8, "ASM": True, "STAGES": stages,
    }  # fmt: skip
    names = kernel._packed.arg_names
    source = ASTSource(
        fn=kernel._packed,
        signature={name: types.get(name, "constexpr") for name in names},
        constexprs=constants,
        attrs={(names.index(n),): [["tt.divisibility", 16]] for n, t in types.items() if t[0] == "*"},
    )
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": WARPS, "num_stages": stages})


def loop(cubin: bytes) -> list[str]:
    """The instructions of the longest loop, without what is skipped where no thread of a warp votes for it."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([TOOLS / "cuobjdump", "-sass", file.name], capture_output=True, text=True).stdout
    found = re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?);", text, re.M)
    lines = [(int(at, 16), code) for at, code in found]
    jumps = [(at, int(target[1], 16)) for at, code in lines if (target := re.search(r"BRA.*?(0x[0-9a-f]+)", code))]
    last, first = max((jump for jump in jumps if jump[1] < jump[0]), key=lambda jump: jump[0] - jump[1])
    votes = [at for at, code in lines if "VOTE" in code and first <= at <= last]
    skipped = next(((at, to) for at, to in jumps if votes and votes[0] < at < to <= last), (last, last))
    return [code for at, code in lines if first <= at <= last and not skipped[0] < at < skipped[1]]


def resources(ptx: str) -> str:
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        command = [TOOLS / "ptxas", "-v", "-arch=sm_90a", file.name, "-o", "/dev/null"]
        said = subprocess.run(command, capture_output=True, text=True).stderr
    registers = re.search(r"Used (\d+) registers", said)
    spilled = re.search(r"(\d+) bytes spill stores", said)
    assert registers and spilled
    return f"{registers[1]} registers, {spilled[1]} bytes spilled"


def resources_of(cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        said = subprocess.run([TOOLS / "cuobjdump", "-res-usage", file.name], capture_output=True, text=True).stdout
    registers, spilled = re.search(r"REG:(\d+)", said), re.search(r"STACK:(\d+)", said)
    assert registers and spilled
    return f"{registers[1]} registers, {spilled[1]} bytes spilled"


def line(name: str, form: Form, codes: list[str], used: str) -> None:
    each = len(codes) * 32 * WARPS / (form.tokens * 2 * form.head_dim)
    kinds = Counter(re.sub(r"^@!?U?P\w+ ", "", code).split()[0].split(".")[0] for code in codes)
    most = ", ".join(f"{name} {count}" for name, count in kinds.most_common(7))
    print(f"{name}: {form.bits} bits, groups of {form.group}: {each:.2f} per number; {used}; {most}")


def main() -> None:
    print(f"Triton {triton.__version__}")
    forms = [Form(bits, group, group, 128) for bits, group in ((2, 32), (2, 128), (3, 32), (4, 32), (4, 128), (8, 32))]
    for form in forms:
        result = compiled(form)
        line("Triton", form, loop(result.asm["cubin"]), resources(result.asm["ptx"]))
    for form in forms:
        cubin = cuda.compiled(form, torch.bfloat16, None, (9, 0), kernel.SPAN, *cuda.arrangement(form))
        line("CUDA C++", form, loop(cubin), resources_of(cubin))


if __name__ == "__main__":
    main()
