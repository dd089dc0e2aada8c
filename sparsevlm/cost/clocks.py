"""Two clocks with one interface: device events on a GPU, the wall clock elsewhere."""

from __future__ import annotations

import time
from typing import NamedTuple

import torch


class Mark(NamedTuple):
    """A moment: `at` on the clock, and the CPU seconds that the process had used by then (all threads)."""

    at: float | torch.cuda.Event
    cpu: float


class WallClock:
    """`time.perf_counter`; CPU operators return when they are done."""

    def mark(self) -> Mark:
        return Mark(time.perf_counter(), time.process_time())

    def elapsed_ms(self, start: Mark, end: Mark) -> float:
        """Time between two marks; call `wait` before."""
        return (end.at - start.at) * 1e3

    def wait(self) -> None:
        """Until everything that was started is done."""


class DeviceClock(WallClock):
    """CUDA events: time on the device, which runs behind the host."""

    def __init__(self, device: torch.device):
        self.device = device

    def mark(self) -> Mark:
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return Mark(event, time.process_time())

    def elapsed_ms(self, start: Mark, end: Mark) -> float:
        return start.at.elapsed_time(end.at)

    def wait(self) -> None:
        torch.cuda.synchronize(self.device)


def clock_for(device: torch.device) -> WallClock:
    """The clock of a device."""
    return DeviceClock(device) if device.type == "cuda" else WallClock()


def cpu_ms(start: Mark, end: Mark) -> float:
    """CPU time of this process between two marks, all threads together, as the operating system accounts for it."""
    return (end.cpu - start.cpu) * 1e3
