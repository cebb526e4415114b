"""Reports rendered from records and published results: tables, plots and the HTML page."""
