"""Sweeps: one recipe trained with many settings, and which of them was best."""
