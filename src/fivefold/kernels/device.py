"""Several GPUs: kernels run on the device of their tensors, which need not be the current one."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

_NOTHING = nullcontext()


def on(device: torch.device) -> AbstractContextManager[object]:
    """Within it, what is launched runs on `device`, on the stream that is current there."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return _NOTHING
    return torch.cuda.device(device)


def numbered(device: torch.device) -> torch.device:
    """A CUDA device by its number, so that what is kept for a device is kept for that one."""
    if device.type != "cuda" or device.index is not None:
        return device
    if not torch.cuda.is_initialized() and not torch.cuda.is_available():
        return device
    return torch.device("cuda", torch.cuda.current_device())
