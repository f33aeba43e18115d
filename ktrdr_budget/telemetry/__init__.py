"""What the limiter tells the outside about itself; each part is imported where it is wanted."""
