"""What drives calls over a store: batches, deadlines, the circuit breaker, repairs, and what is told later."""
