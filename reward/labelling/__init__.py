"""A page on which people judge replies."""
