"""The engine, the loop, schedules and metrics of a training run."""
