"""Who holds which tokens of a row: NumPy and C++, no torch."""

from lclm.context.plan.layouts import build_row_plan, plan_row
from lclm.context.plan.row_plan import RowPlan

__all__ = ["RowPlan", "build_row_plan", "plan_row"]
