"""Measuring: random weights at real size, and what is timed with them."""
