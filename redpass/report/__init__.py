"""Reports: the record of a run as a page, as JSON, and as tables in a terminal."""

from redpass.report.files import read_record, write_report

__all__ = ["read_record", "write_report"]
