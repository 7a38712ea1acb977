"""Configuration: yaml files and `key=value` words -> one checked, immutable `Config`.

    configs/train.yaml < data file < task file < system file < its preset < --config FILE < command line

Groups (`task=`, `system=`, `data=`, `system.preset=`) are chosen first, then files merge in that order. Every key
must be an option of the section it stands in (`schema.py`), every value must have that option's type, and all
problems are reported at once. A value is data and nothing else: no interpolation, no resolver, no python tag, no
import path. This package is the only place that knows OmegaConf.
"""

from condgen.config.reading import read_file, read_words
from condgen.config.resolve import Config, load, load_data
from condgen.config.schema import Option, convert, options_of, options_of_call, suggest

__all__ = [
    "Config", "Option", "convert", "load", "load_data", "options_of", "options_of_call", "read_file", "read_words",
    "suggest",
]  # fmt: skip
