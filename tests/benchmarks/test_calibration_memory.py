"""The memory benchmark runs, on a narrow model, and notices when it is over its limit."""

import pytest
from ternary_flux.benchmarks.speed import calibration_memory


def run(monkeypatch, *arguments):
    size = ("--width", "128", "--side", "32", "--device", "cpu")
    monkeypatch.setattr("sys.argv", ["calibration_memory", *size, *arguments])
    calibration_memory.main()


@pytest.mark.slow
def test_prints_time_and_memory(monkeypatch, capsys):
    run(monkeypatch, "--states", "2", "--sweeps", "0")
    output = capsys.readouterr().out
    assert "double_blocks.0: " in output and "single_blocks.0: " in output and "peak memory" in output


@pytest.mark.slow
def test_fails_over_the_limit(monkeypatch):
    with pytest.raises(SystemExit, match="over the limit"):
        run(monkeypatch, "--states", "1", "--sweeps", "0", "--limit", "0.01")
