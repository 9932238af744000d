"""Tensors of mapped files on their way to a GPU, through pinned memory and beside what it computes."""

import torch
from torch import Tensor

_BUFFER = 64 << 20  # bytes of each of the two pinned buffers


class Staging:
    """Copies in pieces: one buffer is filled from the file while the other's piece is on its way.

    The copies run on a stream of their own. `join` lets the device's current stream wait for them; the host never waits
    for what was computed.
    """

    def __init__(self, device: torch.device, size: int = _BUFFER):
        self.device = device
        self.stream = torch.cuda.Stream(device)
        self._buffers = [torch.empty(size, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
        self._copied = [torch.cuda.Event() for _ in range(2)]
        self._turn = 0

    def copy(self, source: Tensor, dtype: torch.dtype) -> Tensor:
        """A contiguous tensor of main memory, on the device, in this dtype; complete after `join`."""
        size = self._buffers[0].numel() // dtype.itemsize
        with torch.cuda.stream(self.stream):
            target = torch.empty(source.shape, dtype=dtype, device=self.device)
            for piece, place in zip(source.reshape(-1).split(size), target.view(-1).split(size), strict=True):
                copied = self._copied[self._turn]
                copied.synchronize()
                staged = self._buffers[self._turn].view(dtype)[: len(piece)]
                staged.copy_(piece)
                place.copy_(staged, non_blocking=True)
                copied.record(self.stream)
                self._turn ^= 1
        # Freed memory is given to the next copy only when what was computed with it is done.
        target.record_stream(torch.cuda.current_stream(self.device))
        return target

    def join(self) -> None:
        torch.cuda.current_stream(self.device).wait_stream(self.stream)
