"""The side room for the code that made the embedded pair; nothing here runs when the pair is used."""
