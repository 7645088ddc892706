"""Reads ``.fw`` bundles with numpy, constriction and zstandard alone, and opens what is in them in its runtime."""
