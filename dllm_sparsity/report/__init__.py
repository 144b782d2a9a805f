"""From findings to people: one self-contained HTML page, tables as files, and a table for the terminal."""

from dllm_sparsity.report.terminal import render
from dllm_sparsity.report.write import save_report, write_report

__all__ = ["render", "save_report", "write_report"]
