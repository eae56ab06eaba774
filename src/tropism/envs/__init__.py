"""Toy tasks whose best outcome is known exactly, so that what a method reached can be judged."""
