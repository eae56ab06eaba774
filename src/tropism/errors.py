"""Errors a user can mend. Each message names what is wrong, where, and what to do about it."""

from __future__ import annotations


class TropismError(ValueError):
    """Something outside the library's code is wrong; the command line shows it without a traceback."""


class ConfigError(TropismError):
    """A recipe, field or combination of settings that cannot run."""


class DataError(TropismError):
    """A data file or record that cannot be used; names the file and line or the record."""


class RewardError(TropismError):
    """A reward function that raised or returned something unusable; names the function, the step and the row."""


class ModelError(TropismError):
    """A model, tokenizer or checkpoint that cannot be loaded or used."""


class NumericsError(TropismError):
    """A non-finite loss or gradient, or a failed pre-flight check; raised before the weights change."""


class StorageError(TropismError):
    """A file or folder that cannot be written, or that another run is using; nothing that was complete is lost."""


class NoRoomError(TropismError):
    """Not even a single row fits into memory; holds the allocator's own words and the settings to change."""
