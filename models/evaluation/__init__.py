"""Measure defenses under attack: a journal of outcomes, and tables with intervals."""
