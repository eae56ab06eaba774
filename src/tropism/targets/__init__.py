"""Rewards as something to ask for: their scales, and what stands before a prompt to say so."""
