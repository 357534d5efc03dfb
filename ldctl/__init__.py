"""Distil dense object detectors with Localization Distillation."""

__version__ = "0.1.0"
