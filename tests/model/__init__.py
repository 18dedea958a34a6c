"""The tests of the package ``model``."""
