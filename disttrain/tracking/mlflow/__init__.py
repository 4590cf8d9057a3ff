"""What MLflow is sent, and the process that sends it."""
