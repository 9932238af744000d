"""Training a ternary model on the velocities of the original."""
