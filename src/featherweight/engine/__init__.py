"""Runs recipes, measures artifacts in other processes, searches under a budget."""
