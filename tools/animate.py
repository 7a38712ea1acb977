"""Makes clips from pictures with a trained run: `condgen animate` as a file."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a checkout works without being installed

from condgen.cli import main

if __name__ == "__main__":
    sys.exit(main(["animate", *sys.argv[1:]]))
