"""Tests of imgsvc.decrypt."""
