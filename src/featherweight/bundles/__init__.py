"""Writes ``.fw`` bundles: files apart into what is coded and the rest, tables, the file itself, its signature."""
