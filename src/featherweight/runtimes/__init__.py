"""One file per runtime; the file's name is the name in targets."""
