"""Cheap estimates learned from evaluated schedules: which ones are good, and what lies between them."""
