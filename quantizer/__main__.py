"""`python -m quantizer` in the pack's folder, `python PACK/quantizer` anywhere (also with an isolated interpreter), and
`python -m ternary_flux.quantizer` where it is installed.
"""

import os
import signal
import sys

if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # Ctrl-C before there is anything to unwind
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))

if __package__ != "ternary_flux.quantizer":
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    # The pack's modules have common names, as `nodes` and `files`: nothing else may find them.
    inside = os.path.realpath(os.path.join(root, "quantizer"))
    sys.path[:] = [entry for entry in sys.path if os.path.realpath(entry or ".") != inside]
    sys.path.insert(0, root)
    import _pack

    _pack.load()

from ternary_flux.quantizer.cli import main

if __name__ == "__main__":
    main()
