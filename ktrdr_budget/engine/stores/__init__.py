"""The servers that a limiter talks to: where they are, the connections, and what their failures mean."""
