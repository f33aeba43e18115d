"""Send operations to the store in batches, enforce deadlines, and repair data losses of the store."""
