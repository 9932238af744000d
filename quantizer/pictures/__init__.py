"""What the original makes: encoded prompts, pictures, noisy states, velocities."""
