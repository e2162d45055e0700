"""Will a folder load in an engine, with which cache, and was every scale found: answered by files and tables alone."""

from kvq.exporting.check.findings import Finding, Report
from kvq.exporting.check.rules import check_folder, passes, settled, verdict

__all__ = ["Finding", "Report", "check_folder", "passes", "settled", "verdict"]
