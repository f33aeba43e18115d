"""Small programs around ktrdr-budget, and the local provider that they run against."""
