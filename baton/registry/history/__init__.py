"""Where a version comes from, what came of it, and what differs between two."""
