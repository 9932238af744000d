"""The command as one of torchrun's processes, with a calibration that is quick: `as_rank.py RANK ARGUMENT...`.

The process of that rank fails where it should measure quality; -1 is none.
"""

import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import _pack

_pack.load()

from ternary_flux.quantizer import cli, ranks  # noqa: E402
from ternary_flux.quantizer.calibration import calibrate  # noqa: E402
from ternary_flux.quantizer.pipeline.workspace import Workspace  # noqa: E402

QUICK = partial(calibrate.CalibrationSettings, exponents=(), sweeps=0)


def fail(*_) -> None:
    raise ValueError("broken on purpose")


if __name__ == "__main__":
    calibrate.CalibrationSettings = QUICK
    if ranks.rank() == int(sys.argv[1]):
        Workspace.measure = fail
    cli.main(sys.argv[2:])
