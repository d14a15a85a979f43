"""Processes: noticing the end of others, reaping orphans. Foreign programs are run by base/programs.py."""
