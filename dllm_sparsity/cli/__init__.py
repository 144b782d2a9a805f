"""The command line: click only; what takes time to import is imported inside the commands."""
