"""The commands. They parse arguments and print messages; other modules do the work."""
