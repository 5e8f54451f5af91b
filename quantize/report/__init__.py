"""The report of a run: its record as JSON, plots, and the HTML page."""
