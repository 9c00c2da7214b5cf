"""Preference data that ships with the package."""
