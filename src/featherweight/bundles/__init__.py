"""Writes ``.fw`` bundles: what is coded of a file and the rest, tables, the file itself, its signature."""
