"""The three stages: pretrain, sft, ppo; each a program for `accelerate launch -m stages.<name> RECIPE`."""
