"""Prepared text: documents tokenised once into memory-mapped shards, and the rows that training reads from them."""
