"""Experts: by noise level, and within the feed-forward, learned or split from a dense layer."""
