"""Scorers of pictures: scripts that run in environments of their own and are never imported by the pack.

    uv run benchmarks/scorers/clipscore.py FOLDER

FOLDER is the output of `python -m quantizer compare`, which takes the scores in when it is given again.
"""
