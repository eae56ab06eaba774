"""Prompts and demonstrations from files, data sets and Python lists. Start at ``prompts`` and ``demonstrations``."""
