"""Carrying out a plan: replacing modules, and starting the new ones from the old weights."""
