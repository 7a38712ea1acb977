"""One file per sub-command: `main(words) -> exit code`. They print, everything else is done by the layers below."""
