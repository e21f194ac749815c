"""A read-only web page of a registry."""
