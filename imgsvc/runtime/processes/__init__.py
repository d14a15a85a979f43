"""Processes: running short ones, noticing the end of others, reaping orphans."""
