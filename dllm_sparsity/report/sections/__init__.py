"""The sections of the page, one a file: file `quality.py` holds the class `Quality`."""
