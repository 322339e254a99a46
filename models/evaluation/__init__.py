"""Defenses measured under attack: outcomes in a journal, and tables with intervals from it."""
