"""Experts: by noise level, and within the feed-forward, where a gate chooses them for each token."""
