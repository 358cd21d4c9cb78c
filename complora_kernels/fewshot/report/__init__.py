"""The report of a grid: tables, figures and paired comparisons from its results.jsonl."""

from complora_kernels.fewshot.report.folder import report

__all__ = ["report"]
