"""Whether hosts can train together: what is wrong is named before a job waits for it."""
