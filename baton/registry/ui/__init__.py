"""The registry as a read-only web page."""
