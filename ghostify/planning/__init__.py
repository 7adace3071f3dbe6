"""Deciding, before anything is changed, what happens to every convolution and what it saves."""
