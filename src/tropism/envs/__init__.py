"""Environments: text generation a token at a time, and toy tasks whose best outcome is known exactly."""
