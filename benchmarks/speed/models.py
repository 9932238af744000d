"""The models whose sizes the benchmarks take, and a tiny one for dry runs."""

from ternary_flux.quantizer.files.architecture import Architecture

MODELS = {
    "FLUX.1-dev": Architecture(1, 3072, 19, 38, 16, 16, 4096, 768, True),
    "FLUX.2-klein-4B": Architecture(2, 3072, 5, 20, 128, 128, 7680, None, False),
    "FLUX.2-klein-9B": Architecture(2, 4096, 8, 24, 128, 128, 12288, None, False),
    "FLUX.2-dev": Architecture(2, 6144, 8, 48, 128, 128, 15360, None, True),
}
TINY = Architecture(1, 128, 1, 1, 16, 16, 64, 32, True)
