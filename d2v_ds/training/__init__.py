"""The loop: schedules, log, health, and the run that holds them together."""
