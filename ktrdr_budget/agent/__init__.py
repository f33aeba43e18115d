"""The agent: research cycles that cost money, on several replicas."""
