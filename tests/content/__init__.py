"""Tests of imgsvc.content."""
