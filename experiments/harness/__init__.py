"""Runs experiments and keeps their results. Generic: knows nothing of what is measured."""
