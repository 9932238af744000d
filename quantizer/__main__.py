"""`python -m quantizer` from the pack's folder, and `python -m ternary_flux.quantizer` where it is installed."""

if __package__ == "quantizer":
    import _pack

    _pack.load()

from ternary_flux.quantizer.cli import main

if __name__ == "__main__":
    main()
