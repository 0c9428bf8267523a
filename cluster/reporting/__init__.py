"""The report of a sweep, or of a single run: a file of HTML, or the same page live."""

from gradhpo.cluster.reporting.report_page import data_of, report_server, write_report

__all__ = ["data_of", "report_server", "write_report"]
