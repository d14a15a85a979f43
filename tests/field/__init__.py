"""One test per fault found in the field, named by its ID."""
