"""The report of a sweep, or of a single run: a file of HTML, or the same page live."""

from gradhpo.cluster.reporting.report_page import data_of as data_of
from gradhpo.cluster.reporting.report_page import report_server as report_server
from gradhpo.cluster.reporting.report_page import write_report as write_report
