"""How many threads torch gets beside other programs."""

import psutil
import pytest
import torch
from ternary_flux.quantizer.threads import leave_busy_processors


@pytest.mark.parametrize(
    ("most", "busy", "expected"), [(8, 0, 8), (8, 50, 4), (8, 93, 1), (8, 100, 1), (3, 50, 3), (1, 100, 1)]
)
def test_threads_are_those_that_others_leave(monkeypatch, most, busy, expected):
    monkeypatch.setattr(psutil, "cpu_count", lambda: 8)
    monkeypatch.setattr(psutil, "cpu_percent", lambda seconds: busy)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(most)
        assert leave_busy_processors(most) == expected == torch.get_num_threads()
        monkeypatch.setattr(psutil, "cpu_percent", lambda seconds: 0)
        assert leave_busy_processors(most) == most == torch.get_num_threads()
    finally:
        torch.set_num_threads(before)
