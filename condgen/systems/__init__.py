"""One file per generator family. `condgen.registry` finds them by file name."""
