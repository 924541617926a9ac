"""Groundling: GPT-2 trained from scratch on a text until it knows the text by heart."""

__version__ = "0.1.0"
