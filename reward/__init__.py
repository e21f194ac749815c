"""The reward: training a model on preferences, and scoring with it."""
