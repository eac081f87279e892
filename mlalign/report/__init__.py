"""The run, drawn: one HTML page, the summary table, one record's whole story. No torch."""
