"""Cheap estimates learned from evaluated schedules: which are good, and what lies between."""
