"""The loop, and the session around it."""
