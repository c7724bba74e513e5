"""What an operator asks: status, doctor, inspect, replay, metrics."""
