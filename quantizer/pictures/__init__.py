"""What the original makes: encoded prompts, pictures, noisy states, velocities."""

SIZES = "512x512,768x512,512x768,1024x1024"  # in pixels, by default: most states cost a third of the largest or less
