"""Cheap estimates learned from evaluated schedules, and what fits schedules to samples."""
