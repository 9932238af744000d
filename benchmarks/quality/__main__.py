"""`python -m benchmarks.quality` from the pack's folder."""

from ternary_flux.benchmarks.quality.run import main

if __name__ == "__main__":
    main()
