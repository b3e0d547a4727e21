"""Reports: the record of a run as a page, as JSON, and as tables in a terminal."""

from redpass.report.files import read_record, write_report
from redpass.report.page import render

__all__ = ["read_record", "render", "write_report"]
