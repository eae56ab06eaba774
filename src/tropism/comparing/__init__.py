"""Methods side by side: the same model, prompts, reward and budget for all, and what each one bought with it."""
