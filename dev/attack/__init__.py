"""Attacks on the project by chance: damaged weights, odd media, wrong prompts, edited records, kills and rivals.

    python3 dev/run.py attack [CLASS ...] [--seed N] [--count N] [--out FOLDER] [--only NUMBER]

Every input is made from the seed and its number alone, so that any of them can be made again.
"""
