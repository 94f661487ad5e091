"""Ways to make a plain model smaller or faster, each applied from outside at one of its seams."""
