"""What is told of the daemon's work.

observer     called where things happen; fills the two below
metrics      counters, gauges and histograms as a Prometheus page
events       a stream for those who listen now
"""
