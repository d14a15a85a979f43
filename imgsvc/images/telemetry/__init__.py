"""Metrics and events of the daemon's work.

observer     called where things happen; fills the two below
metrics      counters, gauges and histograms as a Prometheus page
events       a stream for current listeners
"""
