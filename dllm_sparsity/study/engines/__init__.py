"""Engines: who runs the cells of a plan. One process, one machine so far."""
