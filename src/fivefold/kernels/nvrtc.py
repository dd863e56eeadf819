"""CUDA C++ that is compiled at run time by NVRTC, and how its kernels are launched."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from fivefold.kernels.device import on

HARDWARE = Path(__file__).with_name("hardware.cuh")
"""What sources may include."""


def machine_code(source: Path, definitions: dict[str, int], capability: tuple[int, int], variant: str = "") -> bytes:
    """CUDA C++ compiled by NVRTC for a compute capability. variant: "a" for what only this one has.

    Raises RuntimeError with the compiler's words if it cannot be compiled.
    """
    from cuda.bindings import nvrtc

    major, minor = capability
    options = [f"--gpu-architecture=sm_{major}{minor}{variant}", "--std=c++17"]
    options += [f"-D{name}={value}" for name, value in definitions.items()]
    given = source.read_bytes(), source.name.encode(), 1, [HARDWARE.read_bytes()], [b"../hardware.cuh"]
    program = done(nvrtc.nvrtcCreateProgram(*given))
    (error,) = nvrtc.nvrtcCompileProgram(program, len(options), [option.encode() for option in options])
    if error != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        log = b" " * done(nvrtc.nvrtcGetProgramLogSize(program))
        done(nvrtc.nvrtcGetProgramLog(program, log))
        raise RuntimeError(
            f"{source.name} does not compile here (FIVEFOLD_KERNELS=triton does without it): {log.decode()}"
        )
    code = b" " * done(nvrtc.nvrtcGetCUBINSize(program))
    done(nvrtc.nvrtcGetCUBIN(program, code))
    done(nvrtc.nvrtcDestroyProgram(program))
    return code


def loaded(
    source: Path, name: str, definitions: dict[str, int], shared: int, device: torch.device, variant: str = ""
) -> Any:
    """A function of a source, compiled and loaded on a device, the current one; shared: bytes of shared memory that a
    program of it takes."""
    torch.cuda.current_stream().synchronize()  # makes the context
    return function_of(
        machine_code(source, definitions, torch.cuda.get_device_capability(device), variant), name, shared
    )


def function_of(code: bytes, name: str, shared: int) -> Any:
    """A function of machine code, loaded on the current device; shared: see `loaded`."""
    from cuda.bindings import driver

    module = done(driver.cuModuleLoadData(code))
    function = done(driver.cuModuleGetFunction(module, name.encode()))
    attributes = driver.CUfunction_attribute
    done(driver.cuFuncSetAttribute(function, attributes.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, shared))
    return function


def launch(
    function: Any, programs: int, threads: int, shared: int, device: torch.device, values: tuple[Any, ...],
    types: tuple[Any, ...], early: bool = False,
) -> None:  # fmt: skip
    """Run a function on a device's current stream. values, types: its arguments, as ctypes has them. early: it may
    begin before the kernel in front of it is done (programmatic dependent launch), and waits itself."""
    from cuda.bindings import driver

    stream, block = torch.cuda.current_stream(device).cuda_stream, (threads, 1, 1)
    with on(device):
        if not early:
            done(driver.cuLaunchKernel(function, programs, 1, 1, *block, shared, stream, (values, types), 0))
            return
        config, attribute = driver.CUlaunchConfig(), driver.CUlaunchAttribute()
        config.gridDimX, config.gridDimY, config.gridDimZ = programs, 1, 1
        config.blockDimX, config.blockDimY, config.blockDimZ = block
        config.sharedMemBytes, config.hStream = shared, stream
        attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
        attribute.value.programmaticStreamSerializationAllowed = 1
        config.attrs, config.numAttrs = [attribute], 1
        done(driver.cuLaunchKernelEx(config, function, (values, types), 0))


def done(returned: tuple) -> Any:
    """What a call returned beside its error."""
    error, *rest = returned
    if int(error):
        raise RuntimeError(f"CUDA: {error!r}")
    return rest[0] if rest else None
