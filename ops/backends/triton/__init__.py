"""Everything of Triton: the kernels, what chooses and launches them, and the backend that the registry knows."""
