"""The endpoints, one file each of those that do work."""
