"""condgen: conditional image and video synthesis under one typed condition interface."""

__version__ = "0.1.0"
