"""Send operations to the store and react to its replies: the event loop, batches, deadlines, repair."""
