"""The fixture that plants versions without files."""

from tests.baton.registry.planting import plant

__all__ = ["plant"]
