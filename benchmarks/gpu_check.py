"""Check and time the decoding kernels on a GPU in one go: `python benchmarks/gpu_check.py --json out.json`."""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time

import torch
import torch.nn.functional as F

from fivefold.kernels.packed_decode import Form
from fivefold.kernels.packed_decode import triton as kernel

FLUSH = None


def median_ms(call, repeats: int = 25) -> float:
    """Median device time of a captured call, L2 flushed before each."""
    global FLUSH
    if FLUSH is None:
        FLUSH = torch.empty(1 << 28, dtype=torch.int8, device="cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    pairs = []
    for _ in range(repeats):
        FLUSH.zero_()
        a, b = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        a.record()
        graph.replay()
        b.record()
        pairs.append((a, b))
    torch.cuda.synchronize()
    return statistics.median(a.elapsed_time(b) for a, b in pairs)


def records(form: Form, pages: int) -> torch.Tensor:
    """Random pages with scales like those of normal numbers: uint8 `[pages, nbytes]`."""
    out = torch.randint(0, 256, (pages, form.nbytes), dtype=torch.uint8, device="cuda")
    d, halves = form.head_dim, out.view(torch.float16)
    key, value = form.tokens // form.group * d, form.tokens * (d // form.channels)
    step = 4.0 / (2**form.bits - 1)
    for start, size in ((32 * d, key), (64 * d + 2 * key, value)):
        halves[:, start : start + size] = step * (0.5 + torch.rand(pages, size, device="cuda")).half()
        halves[:, start + size : start + 2 * size] = -2 + 0.2 * torch.randn(pages, size, device="cuda").half()
    return out


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--json")
    parser.add_argument("--sizes", default="524288x1,131072x4,32768x1,8192x1")
    args = parser.parse_args()
    device = torch.cuda.get_device_name()
    rows_out = []
    src = torch.empty(1 << 31, dtype=torch.int8, device="cuda")
    dst = torch.empty_like(src)
    copy = 2 * src.numel() / median_ms(lambda: dst.copy_(src)) / 1e9
    del src, dst
    print(f"{device}, torch {torch.__version__}, copy {copy:.2f} TB/s", flush=True)
    heads, kv, dim = 4, 8, 128
    for size in args.sizes.split(","):
        context, batch = map(int, size.split("x"))
        rows = kv * batch
        q = torch.randn(rows, heads, dim, device="cuda", dtype=torch.bfloat16)

        def note(name, ms, nbytes, **more):
            row = {"size": size, "kernel": name, "ms": ms, "bytes": nbytes, "tb_s": nbytes / ms / 1e9, **more}
            rows_out.append(row)
            print(f"{size:>10} {name:<44} {ms:8.4f} ms {row['tb_s']:6.2f} TB/s", flush=True)

        keys, values = (torch.randn(rows, 1, context, dim, device="cuda", dtype=torch.bfloat16) for _ in "kv")
        exact_bytes = 2 * keys.nbytes
        grouped = q[:, None]
        from torch.nn.attention import SDPBackend, sdpa_kernel

        best = None
        for name, backend in (("flash", SDPBackend.FLASH_ATTENTION), ("cudnn", SDPBackend.CUDNN_ATTENTION)):
            try:
                with sdpa_kernel(backend):
                    ms = median_ms(lambda: F.scaled_dot_product_attention(grouped, keys, values))
                note(f"sdpa {name} bf16", ms, exact_bytes)
                best = ms if best is None else min(best, ms)
            except Exception as error:
                print(name, "failed:", str(error)[:200])
        # The same numbers in pages.
        pages = context // 32
        where = torch.randperm(rows * pages, device="cuda").view(rows, pages)
        k, v = (x.view(rows * pages, 32, dim) for x in (keys, values))
        table = torch.stack([(x.data_ptr() + where * 32 * dim * 2) // 16 for x in (k, v)], 2)
        span = torch.zeros(rows, kernel.SPAN, dtype=torch.int32, device="cuda")
        span[:, 4] = context
        for tile, warps, stages in ((64, 4, 3), (128, 4, 2), (64, 2, 3), (32, 2, 3)):
            for resident in (2, 4):
                kernel.TUNING.update(exact=(tile, warps, stages), exact_resident=resident)
                try:
                    ms = median_ms(lambda: kernel.decode(q, dim**-0.5, span, exact=kernel.Exact(table, torch.bfloat16)))
                except Exception as error:
                    print("exact", tile, warps, stages, str(error)[:200])
                    continue
                note(f"exact pages, T{tile} w{warps} s{stages} x{resident}", ms, exact_bytes)
        del keys, values, k, v, table
        for bits, group in ((2, 128), (2, 32), (3, 32), (4, 128), (4, 32), (8, 32)):
            form = Form(bits, 32, group, dim)
            columns = context // form.tokens
            data = records(form, rows * columns)
            nbytes = data.nbytes
            for order in ("straight", "scattered"):
                index = torch.arange(rows * columns, device="cuda")
                if order == "scattered":
                    index = torch.randperm(rows * columns, device="cuda")
                table = ((data.data_ptr() + index * form.nbytes) // 16).view(rows, columns)
                span = torch.zeros(rows, kernel.SPAN, dtype=torch.int32, device="cuda")
                span[:, 1] = columns * form.tokens
                tries = [(1, 2, 4), (1, 2, 8), (2, 2, 4)] if order == "straight" else [(1, 2, 4)]
                if order == "straight" and size == "524288x1":
                    tries += [(1, 1, 8), (1, 4, 3), (1, 2, 3), (3, 2, 3)]
                for stages, warps, resident in tries:
                    kernel.TUNING.update(stages=stages, warps=warps, resident=resident)
                    try:
                        ms = median_ms(lambda: kernel.decode(q, dim**-0.5, span, kernel.Packed(table, form)))
                    except Exception as error:
                        print(bits, group, stages, warps, str(error)[:200])
                        continue
                    gain = best / ms if best else 0
                    note(
                        f"{bits} bits, values by {group}, {order} s{stages} w{warps} x{resident} = {gain:.2f}x",
                        ms, nbytes, gain=gain,
                    )  # fmt: skip
            del data
    if args.json:
        with open(args.json, "w") as file:
            stamp = {"date": time.strftime("%Y-%m-%d"), "device": device, "torch": torch.__version__}
            json.dump({**stamp, "python": sys.version, "copy_tb_s": copy, "rows": rows_out}, file, indent=1)


if __name__ == "__main__":
    main()
