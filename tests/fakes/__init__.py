"""Fakes: real behaviour without the outside world. They inherit nothing and pass the contract suites."""
