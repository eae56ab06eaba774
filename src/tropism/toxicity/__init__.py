"""How toxic the text of a model is: prompts, completions, scores, metrics with intervals, files and a page."""
