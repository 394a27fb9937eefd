"""Closed-form repairs of what a plan has left: one file each."""
