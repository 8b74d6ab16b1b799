"""Checks of a conversion against the live models of both libraries."""
