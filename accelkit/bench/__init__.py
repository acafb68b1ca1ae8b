"""Measuring schedules against full depth: time, quality and cost."""
