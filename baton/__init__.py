"""Baton: pretraining, supervised fine-tuning and PPO, chained by verified checkpoints."""

__version__ = "0.1.0"
