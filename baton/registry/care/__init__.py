"""Keeping a registry whole: verification, repair, deletion, garbage collection."""
