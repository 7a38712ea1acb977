"""One file per condition kind: a field of `Condition` -> features in one of four forms."""
