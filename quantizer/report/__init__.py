"""A page that compares ternary files with their original."""
