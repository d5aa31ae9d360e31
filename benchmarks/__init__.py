"""Measurements of the library on any Redis."""
