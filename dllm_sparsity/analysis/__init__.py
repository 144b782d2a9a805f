"""From sealed records to findings: pairing, critical sparsity and per-step tables. Imports no torch."""

from dllm_sparsity.analysis.curves import Curve, Point, curves_of
from dllm_sparsity.analysis.headline import headline
from dllm_sparsity.analysis.loading import Cell, Run, load
from dllm_sparsity.analysis.summary import summary

__all__ = ["Cell", "Curve", "Point", "Run", "curves_of", "headline", "load", "summary"]
