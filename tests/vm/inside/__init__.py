"""Tests that run in the machine, by its own pytest, against the service that systemd started there."""
