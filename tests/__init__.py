"""Tests mirror imgsvc/; tests/support has what they share, tests/e2e drives the real daemon."""
