"""Numbers that the host writes and a device reads at a fixed place."""

from __future__ import annotations

import numpy as np
import torch


class Sending:
    """What is written for `there`, a tensor on a device, and sent when it is complete. The host has two of it, because
    the device may still be reading the one before."""

    def __init__(self, there: torch.Tensor) -> None:
        self.there, cuda = there, there.device.type == "cuda"
        self._hosts = [torch.zeros_like(there, device="cpu", pin_memory=cuda) for _ in range(2)]
        self._events = [torch.cuda.Event() if cuda else None for _ in range(2)]
        self._turn = 0

    @property
    def nbytes(self) -> int:
        return self.there.nbytes + sum(host.nbytes for host in self._hosts)

    def writable(self) -> np.ndarray:
        """Where the next numbers go; waits until nobody reads there any more."""
        event = self._events[1 - self._turn]
        if event is not None:
            event.synchronize()
        return self._hosts[1 - self._turn].numpy()

    def send(self) -> None:
        """Nobody waits for it."""
        self._turn = 1 - self._turn
        self.there.copy_(self._hosts[self._turn], non_blocking=True)
        event = self._events[self._turn]
        if event is not None:
            event.record()
