"""Samplers: one file each; the file's name is the name on the command line."""
