"""Versions on their way: bundles, pushes between registries, the Hugging Face Hub."""
