"""How candidates are proposed, paid for and kept: from a study to schedules."""
