"""What a layout costs before it runs: memory, messages, time, and which layouts fit."""
