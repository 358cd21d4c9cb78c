"""What came out of a grid: tables, figures and paired comparisons, out of its results.jsonl."""

from complora_kernels.fewshot.report.folder import report

__all__ = ["report"]
