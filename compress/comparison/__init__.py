"""Runs against each other, and the conditions on which a comparison fails. No torch."""
