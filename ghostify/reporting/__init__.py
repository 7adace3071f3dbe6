"""Comparing the original and the converted model in plain numbers, and showing them."""
