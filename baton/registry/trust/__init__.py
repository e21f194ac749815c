"""Who vouches for a version: attestations, approvals, gates, signatures, the registry's policy."""
