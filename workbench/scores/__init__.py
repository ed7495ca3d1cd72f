"""Stored scores and their statistics, without imports of torch, lm_eval or recipes."""
