"""Runs every service on one machine."""
