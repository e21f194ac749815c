"""What is known of a reward model: measures on held-out pairs, and the report of them."""
