"""FLUX in torch: the differentiable forward, trainable ternary layers, teacher and student."""
