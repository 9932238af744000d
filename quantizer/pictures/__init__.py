"""What the original makes: encoded prompts, pictures, noisy states, velocities."""

# In pixels, by default: three of four states cost less than half of the largest.
SIZES = "512x512,768x512,512x768,1024x1024"
