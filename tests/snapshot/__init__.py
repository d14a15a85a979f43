"""Tests of imgsvc.snapshot."""
