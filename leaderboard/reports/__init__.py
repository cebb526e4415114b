"""Reports rendered from records and published numbers: tables, plots, the page."""
